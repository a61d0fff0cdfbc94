"""`unmask` as a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import httpx

COMMAND = [sys.executable, "-m", "server.cli"]
ROOT = Path(__file__).parents[2]


def environment(**changes: str) -> dict[str, str]:
    """Ours without settings, on one processor thread."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("UNMASK_")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def unmask(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=120
    )


@dataclass(frozen=True)
class Process:
    """A running `unmask serve`."""

    popen: subprocess.Popen[str]
    url: str
    http: httpx.Client
    logged: Callable[[], list[str]]
    """The lines of its log."""

    def post(self, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": "Tom has", **fields})

    def status(self, path: str) -> int:
        return self.http.get(path).status_code


@contextmanager
def served(*arguments: str, program: Sequence[str] = COMMAND, **changes: str) -> Iterator[Process]:
    """`unmask serve` on a free port, killed at the end of the block unless it has ended."""
    command = [*program, "serve", "--port", "0", "--log-format", "json", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        popen = subprocess.Popen(
            command, cwd=ROOT, env=environment(**changes), stdout=subprocess.PIPE, stderr=log, text=True
        )
        with popen:
            try:
                while not (told := [line for line in _lines(log) if '"serving"' in line]):
                    assert popen.poll() is None, "".join(_lines(log))
                    time.sleep(0.05)
                url = json.loads(told[0])["url"]
                with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
                    yield Process(popen, url, http, partial(_lines, log))
            finally:
                popen.kill()


def _lines(log: IO[str]) -> list[str]:
    """The whole lines in a file that another process writes."""
    return [line for line in os.pread(log.fileno(), 1 << 20, 0).decode().splitlines(True) if line.endswith("\n")]
