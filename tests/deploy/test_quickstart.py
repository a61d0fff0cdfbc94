"""The README's first command on a machine with Python and make, from a fresh copy of the checkout."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.checkout import (
    ANSWER,
    complete,
    copy_checkout,
    free_port,
    plain_environment,
    readme_request,
    wait_until_ready,
)

pytestmark = [pytest.mark.quickstart, pytest.mark.timeout(1200)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "unmask")


@pytest.fixture
def served(checkout: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    command = ["make", "serve", f"PORT={port}"]
    make = subprocess.Popen(command, cwd=checkout, env=plain_environment(), stdin=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}", make
    finally:
        if make.poll() is None:
            for process in (*children(make.pid), make.pid):
                os.kill(process, signal.SIGKILL)
            make.wait()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_make_serve_installs_answers_and_stops(served: tuple[str, subprocess.Popen[bytes]], checkout: Path) -> None:
    url, make = served
    wait_until_ready(url, seconds=900)
    assert complete(url, readme_request()).strip().endswith(ANSWER)

    # make passes the server's exit status on, but would itself die of a signal: stop the server, not make.
    (server,) = children(make.pid)
    os.kill(server, signal.SIGTERM)
    assert make.wait(timeout=60) == 0

    again = subprocess.run(["make", "--question", ".venv/.serve"], cwd=checkout, env=plain_environment(), check=False)
    assert again.returncode == 0, "a second make serve must not install again"
