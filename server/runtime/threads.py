"""Where parallel work is done, as far as that matters."""

import gc
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TURN = 0.001
"""Seconds after which a thread that runs Python lets another one run, if that waits."""


def share_the_interpreter() -> None:
    """Keep short what the event loop waits for while other threads run Python; to be called once all is loaded.

    The garbage collector stops all threads, and looks at everything that there is: a fifth of a second for what torch
    alone brings along. What is there now stays for good and need not be looked at.
    """
    sys.setswitchinterval(TURN)
    gc.collect()
    gc.freeze()


def run_in_own_thread(work: Callable[[], T]) -> T:
    """Do it in a thread that ends with it; what it returns, or raises.

    OpenMP gives every thread that computes helpers of its own, which stay as long as it does. Where all of them are
    more than the cores, it lets helpers sleep between two operations instead of waiting awake: forwards of a small
    model then take twice as long. The thread that runs the engine should be the only one that has helpers.
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
