"""How idle OpenMP threads wait: spinning while processors are free, asleep where other processes want them too."""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from server.runtime.processors import ProcessorUsage, allowed, read_usage

POLICY_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables with which a user chooses how threads wait."""
READING_PERIOD = 0.25
"""Seconds between two readings of the processor time."""
SPARE_PROCESSORS = 0.3
"""Processors, beside those our threads need, that others may keep busy: clients and system services."""
CALM_READINGS = 8
"""Consecutive readings that must find processors free before threads spin again."""
MAX_TEAM = 128
"""Largest team: containers limit threads, and the library ends the process when it cannot start one."""


class Sleepers:
    """Idle threads that make all waiting OpenMP threads of this process sleep instead of spin.

    GNU's library, which torch ships on Linux, lets a waiting thread spin for some milliseconds: within a forward pass
    the next operation comes sooner than a sleeping thread could be woken. Where another program needs a processor too,
    spinning threads take it from the thread that all of them wait for. The library reads its settings only when it is
    loaded; after that, waiting threads sleep only while it has more threads than there are processors (GOMP_SPINCOUNT
    in its manual). This class starts the surplus threads. Unlike a change of the number of computing threads, this
    changes no floating-point result.

    Args:
        libraries: every copy of GNU's OpenMP that is loaded in this process.
    """

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        self._libraries = libraries
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Start the threads, unless they are running."""
        if self._thread is None:
            self._ending.clear()
            started = threading.Event()
            self._thread = threading.Thread(target=self._hold, args=(started,), name="sleepers", daemon=True)
            self._thread.start()
            started.wait()

    def stop(self) -> None:
        """End the threads."""
        if self._thread is not None:
            self._ending.set()
            self._thread.join()
            self._thread = None

    def _hold(self, started: threading.Event) -> None:
        """Hold an idle team, which lives as long as the thread that requested it."""
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        for library in self._libraries:
            # Together with the other threads' helpers, one more than there are processors.
            team = max(2, library.omp_get_num_procs() - torch.get_num_threads() + 2)
            if team <= MAX_TEAM:
                library.GOMP_parallel(nothing, None, ctypes.c_uint(team), ctypes.c_uint(0))
        started.set()
        self._ending.wait()


def openmp_libraries() -> list[ctypes.CDLL]:
    """Loaded copies of GNU's OpenMP; none where another implementation is used, as on macOS."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return [ctypes.CDLL(path) for path in sorted(paths)]


class CrowdWatch:
    """Decides from readings of the processor time if other processes compete with our threads.

    Args:
        needed: number of computing threads.
        processors: number of processors that this process may use.
    """

    def __init__(self, needed: Callable[[], int], processors: Callable[[], int]) -> None:
        self._needed = needed
        self._processors = processors
        self._last: ProcessorUsage | None = None
        self._calm = 0
        self.crowded = False

    def update(self, usage: ProcessorUsage) -> bool:
        """Take one reading. True if threads should sleep while they wait, until the next reading."""
        last, self._last = self._last, usage
        if last is not None:
            free = self._processors() - last.others_until(usage)
            enough = self._needed() == 1 or free >= self._needed() - SPARE_PROCESSORS
            self._calm = self._calm + 1 if enough else 0
            self.crowded = not enough or (self.crowded and self._calm < CALM_READINGS)
        return self.crowded


@cache
def sleep_where_crowded() -> None:
    """From now on, let idle threads of this process sleep whenever other programs need their processors.

    No effect where the environment chooses how threads wait, or without GNU's OpenMP. Stays in force for the life of
    the process.
    """
    libraries = openmp_libraries()
    if libraries and read_usage() is not None and not any(name in os.environ for name in POLICY_VARIABLES):
        sleepers = Sleepers(libraries)
        threading.Thread(target=_watch, args=(sleepers,), name="processor-watch", daemon=True).start()


def _watch(sleepers: Sleepers) -> None:
    watch, never = CrowdWatch(torch.get_num_threads, lambda: len(allowed())), threading.Event()
    while True:
        usage = read_usage()
        assert usage is not None
        if watch.update(usage) != sleepers.running:
            (sleepers.start if watch.crowded else sleepers.stop)()
        never.wait(READING_PERIOD)
