"""Writers that are killed while they write: whatever replaces a file or a folder leaves the old one or the new one.

`python -m tests.kills` kills what all of them are made of before every line. It knows no torch: a fork of it is cheap.
"""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from policies.files.atomic import write_file, write_files, write_together

DIED = 9
"""Exit status of a child that died as it should."""


@dataclass(frozen=True)
class Writer:
    """Something that is written again and again in one place.

    Attributes:
        write: write that version into a folder, which holds the one before it.
        read: the version that a folder holds; raises whatever it likes if it holds none, or parts of several.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]


def forked(work: Callable[[], object]) -> int:
    """Run something in a copy of this process; its id. It ends with status 0, or with 1 where it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the copy lacks; it computes nothing
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_somewhere(writer: Writer, folder: Path, longest: float, chance: random.Random) -> str | None:
    """Let a child write version after version, kill it after up to `longest` seconds; what is wrong with what is left.

    The folder must hold some version, and must take another one afterwards.
    """

    def write_on() -> None:
        for version in range(1, 10_000):
            writer.write(folder, version)

    child = forked(write_on)
    time.sleep(chance.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        writer.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def kill_at_every_step(writer: Writer, folder: Path, functions: Collection[str]) -> tuple[int, list[str]]:
    """Write version 1 over version 0, and die before each line of these functions that is executed, in turn.

    Returns how many lines there were, and what was wrong after dying before which.
    """
    wrong, before = [], 0
    while True:
        writer.write(folder, 0)
        before += 1
        child = forked(partial(dying, writer, folder, before, functions))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (0, DIED):
            return before, [f"line {before}: status {code}"]
        try:
            if writer.read(folder) not in ((1,) if code == 0 else (0, 1)):
                wrong.append(f"line {before}: neither the old nor the new")
            writer.write(folder, 2)
            if writer.read(folder) != 2:
                wrong.append(f"line {before}: the next one is not there")
        except Exception as error:
            wrong.append(f"line {before}: {type(error).__name__}: {error}"[:200])
        if code == 0:
            return before, wrong


def dying(writer: Writer, folder: Path, before: int, functions: Collection[str]) -> None:
    left = before

    def line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(DIED)
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        return line if f"{frame.f_globals.get('__name__')}.{frame.f_code.co_name}" in functions else None

    sys.settrace(call)
    try:
        writer.write(folder, 1)
    finally:
        sys.settrace(None)


def watch(writer: Writer, folder: Path, seconds: float) -> tuple[int, list[str]]:
    """Read on and on while a child writes. Returns how often, and what was wrong with what was read."""
    writer.write(folder, 0)

    def write_on() -> None:
        for version in range(1, 1_000_000):
            writer.write(folder, version)

    child = forked(write_on)
    wrong, reads, end = [], 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            reads += 1
            try:
                writer.read(folder)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}"[:200])
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return reads, wrong


ATOMIC = frozenset(
    f"policies.files.atomic.{name}"
    for name in (*("write_file", "write_files", "write_together", "_ready", "_own", "held", "_exchange_for", "_carry"),)
)


def plain_writers() -> list[Writer]:
    """What all others are made of."""

    def number(path: Path) -> int:
        content = path.read_bytes()
        assert len(content) == 5000 and len(set(content)) == 1
        return content[0]

    def both(folder: Path) -> int:
        assert (folder / "m" / "log").read_text() == "kept"
        found = {number(folder / "m" / name) for name in ("weights", "config")}
        assert len(found) == 1
        return found.pop()

    def together(folder: Path, version: int) -> None:
        (folder / "m").mkdir(exist_ok=True)
        (folder / "m" / "log").write_text("kept")
        write_together(folder / "m", {name: bytes([version]) * 5000 for name in ("weights", "config")})

    def first(folder: Path, version: int) -> None:
        """Without a model before it: the folder is none, or that one."""
        if version == 0:
            for name in ("weights", "config"):
                (folder / "m" / name).unlink(missing_ok=True)
        else:
            together(folder, version)

    def first_or_none(folder: Path) -> int:
        return both(folder) if (folder / "m" / "config").exists() else 0

    def each(folder: Path) -> int:
        assert sorted(path.name for path in folder.iterdir() if path.name[0] != ".") == ["a", "b"]
        return max(number(folder / "a"), number(folder / "b")) if number(folder / "a") >= number(folder / "b") else -1

    return [
        Writer(
            "a file",
            lambda folder, version: write_file(folder / "a", bytes([version]) * 5000),
            lambda f: number(f / "a"),
        ),
        Writer("files", lambda folder, version: write_files(folder, {n: bytes([version]) * 5000 for n in "ab"}), each),
        Writer("files together", together, both),
        Writer("files together, for the first time", first, first_or_none),
    ]


def main() -> int:
    broken = 0
    os.fsync = lambda handle: None  # the disk survives; this is about the process
    for writer in plain_writers():
        with tempfile.TemporaryDirectory() as folder:
            points, wrong = kill_at_every_step(writer, Path(folder), ATOMIC)
        print(f"{writer.name}: {points} points, {len(wrong)} broken", *wrong[:3], sep="\n  ")
        broken += len(wrong)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
