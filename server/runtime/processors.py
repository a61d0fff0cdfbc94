"""Processors available to this process, and the load that other processes put on them."""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
"""Seconds per tick, the unit of `/proc/stat`."""


def allowed() -> set[int]:
    """Numbers of the processors in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota(root: Path = Path("/")) -> float:
    """Processor time that the container may use, in processors; infinite without a limit.

    Args:
        root: directory that contains `proc` and `sys`.
    """
    found = [math.inf]
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        # A limit applies to all groups below it. Inside a container the group's path is often the host's, and missing.
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
    """Time over period; infinite for `max`, a negative time or a missing file."""
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
    """Cumulative processor time, in seconds.

    Attributes:
        at: time of the reading, by the monotonic clock.
        busy: of the processors this process may use: working for any process, or taken by the host.
        own: used by this process.
    """

    at: float
    busy: float
    own: float

    def others_until(self, later: "ProcessorUsage") -> float:
        """Mean number of processors that other processes kept busy between two readings."""
        return max(0.0, (later.busy - self.busy) - (later.own - self.own)) / (later.at - self.at)


def read_usage() -> ProcessorUsage | None:
    """Read the processor time so far; None where the system does not report it (not Linux)."""
    mine, busy = {f"cpu{number}" for number in allowed()}, 0
    lines = _lines(Path("/proc/stat"))
    for line in lines:
        name, *ticks = line.split()
        if name in mine:
            user, nice, system, _idle, _wait, hard, soft, stolen = map(int, ticks[:8])
            busy += user + nice + system + hard + soft + stolen
    return ProcessorUsage(time.monotonic(), busy * TICK, time.process_time()) if lines else None
