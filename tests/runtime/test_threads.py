"""Loading leaves no helper threads behind that would make those of the engine sleep."""

import subprocess
import sys
import threading

import pytest

from server.runtime.threads import run_in_own_thread

LOAD = """
import os, time, torch
from server.engine import Limits
from server.engine.memory import bound_memory
from server.backends.loading import load_model

torch.set_num_threads(2)
backend = load_model(None, device="cpu", dtype="float32").backend
bound_memory(backend, Limits(tokens=2048))
after, calm = 0, 0
while calm < 20:  # helpers of a thread that has ended take a moment to end too
    before, after = after, len(os.listdir("/proc/self/task"))
    calm = calm + 1 if after == before else 0
    time.sleep(0.05)
x = torch.randn(2048, 2048)
(x @ x).sum()  # what would be left if this thread computed
print(after, len(os.listdir("/proc/self/task")))
"""


def test_loading_and_measuring_leave_no_helpers() -> None:
    done = subprocess.run([sys.executable, "-c", LOAD], check=True, capture_output=True, text=True, timeout=280)
    after, computing = map(int, done.stdout.split())
    assert computing == after + 1


def test_what_is_done_apart_returns_or_raises() -> None:
    assert run_in_own_thread(threading.current_thread) is not threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        run_in_own_thread(lambda: 1 // 0)
