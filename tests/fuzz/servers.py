"""Servers under test: the app on a socket of this process, or `unmask serve`."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import torch

from tests.api.serving import serving, until
from tests.e2e.processes import served
from tests.fuzz.families import POLICY, Subject


@contextmanager
def one_thread() -> Iterator[None]:
    """The models are too small to share out, and helpers wait for busy processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def here(subject: Subject) -> Iterator[str]:
    """Its limits are low, so that requests wait for room, and not all rows take part in each forward."""
    with one_thread(), serving(subject.folder, sampler=None, max_batch=6, max_batch_tokens=600) as running:
        if not subject.family.drafts:
            running.policies.load(POLICY.name, POLICY)
        yield running.url


@contextmanager
def process(subject: Subject) -> Iterator[str]:
    policy = [] if subject.family.drafts else ["--policy", f"{POLICY.name}={POLICY}"]
    with served("--model", str(subject.folder), "--dtype", "float32", *policy) as running:
        until(lambda: answers(running.url))  # what it says of itself it may say before it listens
        yield running.url


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
    except httpx.ConnectError:
        return False
