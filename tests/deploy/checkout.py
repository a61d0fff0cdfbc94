"""The checkout, a copy of what git would commit of it, and how to talk to a server that was started from it."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROBLEM = "TO BE SET"
ANSWER = "TO BE SET"


def copy_checkout(target: Path) -> Path:
    """A fresh clone, but of the working tree: nothing that git ignores comes along."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def plain_environment() -> dict[str, str]:
    """Our environment without what make and an active virtual environment put there."""
    ours = ("MAKE", "MFLAGS", "VIRTUAL_ENV", "PYTHON", "PYTEST", "UNMASK_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def wait_until_ready(url: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url}/ready did not answer 200 within {seconds} s: {error}") from error
            time.sleep(0.2)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def complete(url: str, **fields: Any) -> Any:
    """The JSON answer to a completion request; the model is the first one listed."""
    body = {"model": get(f"{url}/v1/models")["data"][0]["id"], "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)
