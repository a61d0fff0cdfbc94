"""Where other programs want the processors, our threads wait asleep; elsewhere awake."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from server.runtime.processors import ProcessorUsage, allowed, quota, read_usage
from server.runtime.waiting import CALM_READINGS, CrowdWatch, sleep_where_crowded

SPUN = """
import os, time, torch
from server.runtime.waiting import Sleepers, openmp_libraries

torch.set_num_threads(2)
sleepers = Sleepers(openmp_libraries())
before = set(os.listdir("/proc/self/task"))
x = torch.ones(1 << 20)
[helper] = set(os.listdir("/proc/self/task")) - before

def spun():
    '''Seconds that the helper computed while it had nothing to do for a fifth of a second.'''
    def computed():
        with open(f"/proc/self/task/{helper}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9
    total = 0
    for _ in range(100):
        x.add_(1)
        began, at = computed(), time.monotonic()
        while time.monotonic() < at + 0.002:
            pass
        total += computed() - began
    return total

awake = spun()
sleepers.start()
asleep = spun()
sleepers.stop()
print(awake, asleep, spun())
"""

WATCHED = """
import threading, torch
import server.runtime.waiting as waiting

torch.set_num_threads(2)
come = threading.Event()
waiting.Sleepers.start = lambda self: come.set()
{start}
print(come.wait(20))
"""
ENGINE = """
from server.engine import Engine
from server.runtime.metrics import Metrics
from server.backends.loading import load_model

engine = Engine(load_model(None, device="cpu", dtype="float32").backend, Metrics("a"))
engine.start()
"""
BUSY = [sys.executable, "-c", "while True: pass"]
BARE = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=BARE).stdout


@pytest.mark.skipif(len(allowed()) < 2, reason="one processor: no helpers")
def test_a_helper_that_waits_uses_no_processor_while_the_sleepers_are_there() -> None:
    for _ in range(3):  # what else is busy can take the processor from a helper that waits awake
        awake, asleep, awake_again = map(float, run(SPUN).split())
        if min(awake, awake_again) > 2 * asleep:
            return
    raise AssertionError(f"{awake} s awake, {asleep} s while they were there, {awake_again} s afterwards")


def test_busy_neighbours_are_noticed_by_an_engine() -> None:
    neighbours = [subprocess.Popen(BUSY) for _ in allowed()]
    try:
        assert run(WATCHED.format(start=ENGINE)).split() == ["True"]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_environment_says_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    before = threading.active_count()
    sleep_where_crowded.__wrapped__()
    assert threading.active_count() == before


def looks(watch: CrowdWatch, *others: float) -> list[bool]:
    """What it decides when others keep so many processors busy, a second each, beside one of our own."""
    usage = ProcessorUsage(0.0, 0.0, 0.0)
    found = [watch.update(usage)]
    for each in others:
        usage = ProcessorUsage(usage.at + 1, usage.busy + 1 + each, usage.own + 1)
        found.append(watch.update(usage))
    return found[1:]


def test_it_is_crowded_when_others_use_what_our_threads_need() -> None:
    assert looks(CrowdWatch(lambda: 2, lambda: 2), 0.0, 0.1, 1.0) == [False, False, True]
    assert looks(CrowdWatch(lambda: 1, lambda: 2), 1.0, 2.0) == [False, False]  # a thread alone waits for nobody
    assert looks(CrowdWatch(lambda: 2, lambda: 8), 5.0, 7.0, 8.0) == [False, True, True]
    assert looks(CrowdWatch(lambda: 4, lambda: 2), 0.0) == [True]  # more threads than processors


def test_threads_wait_awake_again_only_after_a_while() -> None:
    watch = CrowdWatch(lambda: 2, lambda: 2)
    assert looks(watch, 1.0, *[0.0] * CALM_READINGS) == [True] * CALM_READINGS + [False]
    assert looks(CrowdWatch(lambda: 2, lambda: 2), 1.0, 0.0, 1.0, *[0.0] * CALM_READINGS) == [True] * (
        CALM_READINGS + 2
    ) + [False]


def test_our_own_work_is_not_others_and_others_is() -> None:
    before = read_usage()
    assert before is not None
    neighbour = subprocess.Popen(BUSY)
    try:
        while time.process_time() < before.own + 0.3:
            pass
        after = read_usage()
    finally:
        neighbour.kill()
        neighbour.wait()
    assert after is not None
    assert after.own - before.own >= 0.3
    assert 0.1 < before.others_until(after) <= len(allowed()) + 0.1


@pytest.mark.parametrize(
    ("group", "files", "processors"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, float("inf")),
        ("0::/", {}, float("inf")),
        ("0::/a.slice/b", {"a.slice/b/cpu.max": "max 100000", "a.slice/cpu.max": "200000 50000"}, 4.0),
        ("0::/kubepods/of-the-host", {"cpu.max": "50000 100000"}, 0.5),
        (
            "5:cpu,cpuacct:/a\n4:memory:/b",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
    ],
)
def test_the_limit_of_a_container_is_read(tmp_path: Path, group: str, files: dict[str, str], processors: float) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert quota(tmp_path) == processors
