"""A few random requests to every family in each run of the tests; `make test-fuzz` sends a thousand."""

import os
import random
import secrets
from pathlib import Path

import pytest

from server.models.families.registry import ARCHITECTURES
from tests.api.models import needs_torch_engine
from tests.fuzz.campaign import Campaign, Report
from tests.fuzz.families import FAMILIES, Subject
from tests.fuzz.servers import here, process

pytestmark = needs_torch_engine

SEED = int(os.environ.get("UNMASK_FUZZ_SEED") or secrets.randbelow(2**32))


def nothing_wrong(report: Report) -> None:
    assert not report.failures, "\n".join(failures[0].lines() for failures in report.distinct().values())
    assert report.answered, f"seed {SEED}: everything was refused"


def test_every_architecture_is_asked() -> None:
    assert {family.architecture for family in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_random_requests(name: str, tmp_path: Path) -> None:
    nothing_wrong(Campaign(Subject.make(name, tmp_path), here, SEED).run(range(6)))


def test_random_requests_to_a_process(tmp_path: Path) -> None:
    name = random.Random(SEED).choice(list(FAMILIES))
    nothing_wrong(Campaign(Subject.make(name, tmp_path), process, SEED).run(range(5)))
