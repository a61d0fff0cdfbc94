"""`unmask serve` as a process, with a log that is read to its end."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.processes import COMMAND, ROOT, environment

PATIENCE = 120.0
"""Seconds that a server may take to start."""


@dataclass(frozen=True)
class Server:
    """A running process."""

    pid: int
    url: str
    log: Path

    def faults(self) -> Iterator[str]:
        """What no log may hold: errors, and the traces of exceptions."""
        with self.log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    told = json.loads(line)
                except ValueError:
                    if "Traceback" in line or "Error" in line:
                        yield f"log: {line.strip()[:500]}"
                    continue
                if told.get("level") in ("error", "critical") or "exception" in told:
                    yield f"log: {line.strip()[:3000]}"


@contextmanager
def soaked(arguments: Sequence[str], folder: Path, **changes: str) -> Iterator[Server]:
    """A server on a free port of this machine; asked to stop at the end, which it must do with status 0."""
    log = folder / "log"
    command = [*COMMAND, "serve", "--host", "127.0.0.1", "--port", "0", "--log-format", "json", *arguments]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**changes), stdout=stderr, stderr=stderr)
    try:
        url = _address(process, log)
        yield Server(process.pid, url, log)
        process.terminate()
        assert process.wait(PATIENCE) == 0, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where it listens, once it does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if '"serving"' in line and line.endswith("}"):
                url: str = json.loads(line)["url"]
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    return url
        time.sleep(0.05)
    raise AssertionError("the server does not start")
