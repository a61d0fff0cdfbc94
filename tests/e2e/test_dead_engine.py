"""An engine that dies takes the process with it, so that whatever supervises it starts another."""

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.processes import Process, served

BREAKS = """
import ctypes, os, signal, sys, threading
from server import cli
from server.http import lifecycle
from server.backends.contract import BackendDeadError
from server.backends.torch.backend import TorchBackend

how, notice, leave, broken = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1), threading.Event()
if notice:
    lifecycle.FAILURE_NOTICE = float(notice)
if leave:
    lifecycle.EXIT_TIMEOUT = float(leave)
predict = TorchBackend.predict

def breaking(self, query):
    if broken.is_set():
        if how == "backend":
            raise BackendDeadError("the device is gone")
        if how == "thread":
            own = ctypes.c_ulong(threading.get_ident())
            ctypes.pythonapi.PyThreadState_SetAsyncExc(own, ctypes.py_object(SystemExit))
        if how == "hanging":
            self.close = lambda: threading.Event().wait()
            raise BackendDeadError("the device is gone")
    return predict(self, query)

TorchBackend.predict = breaking
signal.signal(signal.SIGUSR1, lambda *_: broken.set())
cli.main()
"""
LONG = {"max_tokens": 200, "block_length": 1}


def die(process: Process) -> None:
    """Break the engine in the midst of a stream, and see that stream end by an error."""
    with process.http.stream("POST", "/v1/completions", json={"prompt": "Tom has", "stream": True, **LONG}) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.popen.send_signal(signal.SIGUSR1)
        events = [line for line in lines if line]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] in (
        "server_error",
        "service_unavailable_error",
    )


@contextmanager
def breakable(model: Path, how: str, notice: str = "", leave: str = "") -> Iterator[Process]:
    """A server whose engine dies at SIGUSR1. Other times than its own for what follows spare a test the waiting."""
    program = [sys.executable, "-c", BREAKS, how, notice, leave]
    with served("--model", str(model), program=program) as process:
        yield process


@pytest.mark.parametrize(
    ("how", "notice", "leave", "seconds"),
    [("backend", "", "", 4), ("thread", "0.1", "", 2), ("hanging", "0.1", "1", 4)],
)
def test_the_process_ends_with_status_1(tiny_model: Path, how: str, notice: str, leave: str, seconds: float) -> None:
    with breakable(tiny_model, how, notice, leave) as process:
        die(process)
        began = time.monotonic()
        assert process.popen.wait(timeout=60) == 1
        assert time.monotonic() - began < 5 * seconds  # less than seconds on a machine that has nothing else to do
        logged = [json.loads(line) for line in process.logged()]
        assert [line for line in logged if "engine died" in line["event"] and line["level"] == "error"]


def test_clients_hear_of_it_first(tiny_model: Path) -> None:
    with breakable(tiny_model, "backend", notice="20") as process, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(process.post, **LONG, n=8)
        die(process)
        assert waiting.result().status_code in (500, 503)
        assert process.status("/health") == process.status("/ready") == 503
        refused = process.post(max_tokens=1)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_serving"
        assert process.popen.poll() is None
