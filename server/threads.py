"""Where parallel work is done, as far as that matters."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def apart(work: Callable[[], T]) -> T:
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

    thread = threading.Thread(target=run, name="apart")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
