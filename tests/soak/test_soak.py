"""A slice of the soak, and that whatever grows is noticed. `make soak` takes half an hour."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.api.models import needs_torch_engine
from tests.soak.campaign import soak
from tests.soak.judging import SLACK, Outcome, judge, table
from tests.soak.reading import Reading, descendants, resident
from tests.soak.server import Server

WARM = Reading(memory=400_000_000, descriptors=14, threads=12, children=0, tasks=2, running=0, waiting=0)
CALM = Outcome("calm", WARM, WARM, WARM, {"whole": 10}, 7, {200: 9, 400: 1}, [])


@needs_torch_engine
def test_a_slice_of_the_soak() -> None:
    """KVSlot has a bound of its own: a server of some seconds is not warm."""
    outcome = soak("llada", 2.0, seed=1, at_once=4)
    assert list(judge(outcome, growth=2.0)) == []
    assert sum(outcome.requests.values()) >= outcome.since > 0 and table(outcome)


def test_what_holds_is_nothing_to_tell() -> None:
    assert list(judge(CALM)) == []
    fewer = replace(WARM, memory=WARM.memory // 2, descriptors=5, threads=3, tasks=1)
    assert list(judge(replace(CALM, end=fewer))) == []


@pytest.mark.parametrize("name", SLACK)
def test_what_grows_is_noticed(name: str) -> None:
    most = getattr(WARM, name) + SLACK[name]
    assert list(judge(replace(CALM, end=replace(WARM, **{name: most})))) == []
    (said,) = judge(replace(CALM, end=replace(WARM, **{name: most + 1})))
    assert name in said


def test_memory_gauges_and_faults_are_noticed() -> None:
    (said,) = judge(replace(CALM, end=replace(WARM, memory=int(WARM.memory * 1.06))))
    assert "6.0%" in said
    for name in ("running", "waiting"):
        (said,) = judge(replace(CALM, end=replace(WARM, **{name: 1})))
        assert name in said
    assert list(judge(replace(CALM, faults=["a stream: status 500"]))) == ["a stream: status 500"]
    assert list(judge(replace(CALM, statuses={400: 10})))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"level": "info", "event": "request", "status": 200}', False),
        ('{"level": "warning", "event": "policy not loaded", "error": "..."}', False),
        ('{"level": "error", "event": "request failed"}', True),
        ('{"level": "info", "event": "x", "exception": "Traceback"}', True),
        ("Traceback (most recent call last):", True),
        ("free(): invalid pointer", False),
    ],
)
def test_a_log_with_an_error_is_noticed(tmp_path: Path, line: str, fault: bool) -> None:
    log = tmp_path / "log"
    log.write_text(f'{{"level": "info", "event": "serving"}}\n{line}\n')
    assert bool(list(Server(0, "", log).faults())) == fault


def test_memory_and_children_are_read_from_outside() -> None:
    program = "import sys; held = bytearray(50_000_000); print(len(held), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        assert 50_000_000 < resident(child.pid) < 150_000_000
