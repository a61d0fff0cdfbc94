"""Take each guard out of a copy of the checkout, and see whether its tests notice.

python -m tests.guards [PART OF AN AREA OR A NAME ...] [--share 1/2] [--table]
"""

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.deploy.checkout import copy_checkout
from tests.guards.listed import ROOT, Guard, guards

OURS = ("samplers", "policies", "server", "tests")
LIBRARIES = (
    "torch",
    "fastapi",
    "uvicorn",
    "httpx",
    "openai",
    "hypothesis",
    "tokenizers",
    "safetensors.torch",
    "jinja2",
)
SECONDS = 120.0
"""Longest that the tests of one guard may take; what hangs without a guard has noticed that it is gone."""
FAILED = 1
"""pytest's exit status where a test failed; others are no verdict, such as a test that is not there."""


ARGUMENTS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
ARGUMENTS += ("-W", "ignore::ResourceWarning")  # a test that fails leaves sockets open: that is no verdict on pytest
NO_VERDICT = 99
"""Exit status where pytest itself ended badly."""


def noticed(guard: Guard, copy: Path) -> str:
    """How the guard's tests took its absence: "failed", "hung", or what went wrong with asking them."""
    path = copy / guard.file
    source = path.read_text(encoding="utf-8")
    path.write_text(guard.removed(source), encoding="utf-8")
    try:
        status = status_of(guard.tests, copy)
    finally:
        path.write_text(source, encoding="utf-8")
    if status is None:
        return "hung"
    return {FAILED: "failed", 0: "UNNOTICED"}.get(status, f"NOT RUN (pytest's exit status {status})")


def status_of(tests: Sequence[str], copy: Path) -> int | None:
    """pytest's exit status in a copy of the checkout, None if it did not end.

    In a fork of this process, which has imported everything but our own code: that takes longer than most tests.
    """
    child = os.fork()
    if child == 0:
        os.setsid()  # what tests start ends with them
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.chdir(copy)
        sys.path[:] = [str(copy), *(each for each in sys.path if Path(each or ".").resolve() not in (ROOT, copy))]
        os.environ["PYTHONPATH"] = str(copy)
        sys.dont_write_bytecode = True
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        try:
            status = int(pytest.main([*ARGUMENTS, *tests]))
        except BaseException:
            status = NO_VERDICT
        os._exit(status)
    began = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > SECONDS:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guards", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="only guards whose area or name holds one of these")
    parser.add_argument(
        "--share", default="1/1", metavar="I/N", help="only the I-th of N shares, for several processes"
    )
    parser.add_argument("--table", action="store_true", help="print the list, take nothing out")
    asked = parser.parse_args()
    chosen = [
        guard for guard in guards() if not asked.parts or any(p in f"{guard.area}: {guard.name}" for p in asked.parts)
    ]
    share, shares = map(int, asked.share.split("/"))
    chosen = chosen[share - 1 :: shares]
    if asked.table:
        print("| area | guard | in | noticed by |\n|---|---|---|---|")
        for guard in chosen:
            print(f"| {guard.area} | {guard.name} | `{guard.file}` | {', '.join(f'`{t}`' for t in guard.tests)} |")
        return 0
    for name in LIBRARIES:
        importlib.import_module(name)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="unmask-guards-") as folder:
        copy_checkout(Path(folder))
        for guard in chosen:
            began = time.monotonic()
            verdict = noticed(guard, Path(folder))
            wrong += verdict not in ("failed", "hung")
            print(f"{verdict:9}  {time.monotonic() - began:5.1f} s  {guard.area}: {guard.name}", flush=True)
    print(f"{len(chosen)} guards, {wrong} of which nobody misses")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
