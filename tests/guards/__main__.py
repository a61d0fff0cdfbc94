"""Take each guard out of a copy of the checkout, and see whether its tests notice.

python -m tests.guards [PART OF AN AREA OR A NAME ...] [--table]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.guards.listed import ROOT, Guard, guards

SECONDS = 240.0
"""Longest that the tests of one guard may take; what hangs without a guard has noticed that it is gone."""
FAILED = 1
"""pytest's exit status where a test failed; others are no verdict, such as a test that is not there."""


def copy_checkout(to: Path) -> None:
    """Copy what git knows of and does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def noticed(guard: Guard, copy: Path) -> str:
    """How the guard's tests took its absence: "failed", "hung", or what went wrong with asking them."""
    path = copy / guard.file
    source = path.read_text(encoding="utf-8")
    path.write_text(guard.removed(source), encoding="utf-8")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *guard.tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            timeout=SECONDS,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return "hung"
    finally:
        path.write_text(source, encoding="utf-8")
    if done.returncode == FAILED:
        return "failed"
    if done.returncode == 0:
        return "UNNOTICED"
    return f"NOT RUN (pytest's exit status {done.returncode}): {done.stdout[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.guards", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="only guards whose area or name holds one of these")
    parser.add_argument("--table", action="store_true", help="print the list, take nothing out")
    asked = parser.parse_args()
    chosen = [
        guard for guard in guards() if not asked.parts or any(p in f"{guard.area}: {guard.name}" for p in asked.parts)
    ]
    if asked.table:
        print("| area | guard | in | noticed by |\n|---|---|---|---|")
        for guard in chosen:
            print(f"| {guard.area} | {guard.name} | `{guard.file}` | {', '.join(f'`{t}`' for t in guard.tests)} |")
        return 0
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
