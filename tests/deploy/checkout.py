"""The checkout, a copy of what git would commit of it, and how to talk to a server that was started from it."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ANSWER = "#### 19"


def readme_request() -> dict[str, Any]:
    """The body of the README's first request."""
    found = re.search(r"/v1/completions [^\n]* -d '(\{.*?\n\})'", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    request: dict[str, Any] = json.loads(found[1])
    return request


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


def complete(url: str, request: dict[str, Any]) -> str:
    """The text of a completion."""
    headers = {"content-type": "application/json"}
    posted = urllib.request.Request(f"{url}/v1/completions", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(posted, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text
