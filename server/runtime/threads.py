"""Interpreter switching and the placement of parallel work on threads."""

import gc
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SWITCH_INTERVAL = 0.001
"""Seconds after which a thread that runs Python yields to a waiting one."""


def share_the_interpreter() -> None:
    """Shorten the event loop's waits while other threads run Python. Call once everything is loaded.

    The garbage collector stops all threads while it scans every object: a fifth of a second for torch's alone. Objects
    that exist now live as long as the process and are excluded from later scans.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.collect()
    gc.freeze()


def run_in_own_thread(work: Callable[[], T]) -> T:
    """Run `work` in a new thread that ends with it; return its result or raise its exception.

    OpenMP gives every computing thread a team of helpers, which live as long as the thread. Once all teams together
    exceed the cores, OpenMP lets helpers sleep between two operations instead of spinning: forward passes of a small
    model then take twice as long. Only the engine's thread should have a team.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="run_in_own_thread")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
