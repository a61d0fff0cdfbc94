"""How OpenMP's threads wait for each other: awake while processors are free, asleep where others want them too."""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from server.runtime.processors import ProcessorUsage, allowed, read_usage

CHOSEN_BY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Variables with which a user decides how threads wait."""
PERIOD = 0.25
"""Seconds between two looks at the processors."""
MARGIN = 0.3
"""Processors that others may keep busy of those that our threads need: clients, and what a system does beside."""
CALM = 8
"""Looks in a row that must find processors free before threads wait awake again."""
MOST_SLEEPERS = 128
"""Containers limit threads, and the library ends the process when it cannot start one."""


class Sleepers:
    """Threads that do nothing, so that all OpenMP threads of this process wait asleep.

    GNU's library, which torch brings along on Linux, lets a thread wait awake for some milliseconds: within a forward
    the next piece of work comes before the thread could have been woken. Where another program wants a processor too,
    the thread that all wait for is often the one that has none, because those that wait use it up. The library reads
    its settings when it is loaded; after that it lets waiting threads sleep only while it has more threads than there
    are processors (GOMP_SPINCOUNT in its manual). These are the threads too many. Unlike a change of the number of
    threads that compute, this changes no sum.

    Args:
        libraries: GNU's OpenMP, as often as this process has it.
    """

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        self._libraries = libraries
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def there(self) -> bool:
        return self._thread is not None

    def come(self) -> None:
        """Start them, unless they are there."""
        if self._thread is None:
            self._over.clear()
            started = threading.Event()
            self._thread = threading.Thread(target=self._hold, args=(started,), name="sleepers", daemon=True)
            self._thread.start()
            started.wait()

    def go(self) -> None:
        """End them."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None

    def _hold(self, started: threading.Event) -> None:
        """A team stays as long as the thread that asked for it."""
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        for library in self._libraries:
            # With the other threads' helpers that is one more than there are processors.
            team = max(2, library.omp_get_num_procs() - torch.get_num_threads() + 2)
            if team <= MOST_SLEEPERS:
                library.GOMP_parallel(nothing, None, ctypes.c_uint(team), ctypes.c_uint(0))
        started.set()
        self._over.wait()


def openmp_libraries() -> list[ctypes.CDLL]:
    """GNU's OpenMP, as often as this process has it; none where it has another, as on macOS."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
    return [ctypes.CDLL(path) for path in sorted(paths)]


class CrowdWatch:
    """Decides from looks at the processors whether there are enough for our threads.

    Args:
        needed: how many threads compute.
        processors: how many this process may use.
    """

    def __init__(self, needed: Callable[[], int], processors: Callable[[], int]) -> None:
        self._needed = needed
        self._processors = processors
        self._last: ProcessorUsage | None = None
        self._calm = 0
        self.crowded = False

    def look(self, usage: ProcessorUsage) -> bool:
        """Take one reading; whether threads should wait asleep until the next."""
        last, self._last = self._last, usage
        if last is not None:
            free = self._processors() - last.others_until(usage)
            enough = self._needed() == 1 or free >= self._needed() - MARGIN
            self._calm = self._calm + 1 if enough else 0
            self.crowded = not enough or (self.crowded and self._calm < CALM)
        return self.crowded


@cache
def sleep_where_crowded() -> None:
    """From now on let waiting threads of this process sleep whenever other programs want their processors.

    Does nothing where the environment says how threads wait, and without GNU's OpenMP. It belongs to the process and
    ends with it.
    """
    libraries = openmp_libraries()
    if libraries and read_usage() is not None and not any(name in os.environ for name in CHOSEN_BY):
        sleepers = Sleepers(libraries)
        threading.Thread(target=_watch, args=(sleepers,), name="processor-watch", daemon=True).start()


def _watch(sleepers: Sleepers) -> None:
    watch, never = CrowdWatch(torch.get_num_threads, lambda: len(allowed())), threading.Event()
    while True:
        usage = read_usage()
        assert usage is not None
        if watch.look(usage) != sleepers.there:
            (sleepers.come if watch.crowded else sleepers.go)()
        never.wait(PERIOD)
