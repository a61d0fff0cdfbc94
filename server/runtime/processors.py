"""The processors that this process may use, and how much of them others use."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
"""Seconds; what `/proc/stat` counts in."""


def allowed() -> set[int]:
    """Numbers of the processors that the scheduler may give this process."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota(root: Path = Path("/")) -> float:
    """Processors' worth of time that a container may use; infinite without a limit.

    Args:
        root: where `proc` and `sys` are.
    """
    found = [math.inf]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # A limit holds for all below it. Within a container the path of its group is often the host's, and not there.
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            if not controllers:
                found.append(_share(_lines(root / "sys/fs/cgroup" / group / "cpu.max")))
            elif "cpu" in controllers.split(","):
                place = root / "sys/fs/cgroup" / controllers / group
                given, period = (_lines(place / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                found.append(_share([" ".join(given + period)]))
    return min(found)


def _share(limit: list[str]) -> float:
    """Time over period; `max` or a negative time is no limit, as is a file that is not there."""
    words = " ".join(limit).split()
    if len(words) != 2 or words[0] == "max" or int(words[0]) <= 0:
        return math.inf
    return int(words[0]) / int(words[1])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class ProcessorUsage:
    """Seconds so far.

    Attributes:
        at: by the clock.
        busy: of processors that this process may use, at work for anybody or taken by the machine's host.
        own: of processors at work for this process.
    """

    at: float
    busy: float
    own: float

    def others_until(self, later: "ProcessorUsage") -> float:
        """Processors that others kept busy between two readings."""
        return max(0.0, (later.busy - self.busy) - (later.own - self.own)) / (later.at - self.at)


def read_usage() -> ProcessorUsage | None:
    """How long processors have worked; None where the system does not say (it is not Linux)."""
    mine, busy = {f"cpu{number}" for number in allowed()}, 0
    lines = _lines(Path("/proc/stat"))
    for line in lines:
        name, *ticks = line.split()
        if name in mine:
            user, nice, system, _idle, _wait, hard, soft, stolen = map(int, ticks[:8])
            busy += user + nice + system + hard + soft + stolen
    return ProcessorUsage(time.monotonic(), busy * TICK, time.process_time()) if lines else None
