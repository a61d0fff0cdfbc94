"""All or nothing: whoever writes may be killed at any point, and others may read and write at any time."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from policies.evaluation.results import Results, add_row, open_results
from policies.files import atomic
from policies.files.atomic import write_file, write_files, write_together
from policies.serving.checkpoint import CARD, NEXT, WEIGHTS, PolicyError, load_policy
from tests.kills import Writer, kill_at_every_step, kill_somewhere, plain_writers, watch
from tests.writers import all_writers, policies, row

ROOT = Path(__file__).parents[3]
SAVING = {"policies.serving.checkpoint.save_policy", "policies.files.atomic.write_files"}


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Writer]:
    return {writer.name: writer for writer in all_writers(tmp_path_factory.mktemp("training"))}


NAMES = (
    *("a policy", "the state of a policy's training", "the state of a model's training", "an exported model"),
    *("rows of evaluate", "a model card", "results of bench", "runs that were collected", "a plot"),
)


def test_what_all_writers_are_made_of_can_be_killed_before_every_line() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.kills"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 broken") == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_writer_is_made_of_that(
    writers: dict[str, Writer], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files that are there afterwards were made ready beside their place and renamed."""
    made: set[str] = set()
    ready = atomic._ready

    def recorded(path: Path, content: bytes) -> AbstractContextManager[Path]:
        made.add(path.name)
        return ready(path, content)

    monkeypatch.setattr(atomic, "_ready", recorded)
    given = {"README.md"} if name == "a model card" else {"log.jsonl"} if name == "an exported model" else set()
    for version in (1, 2):
        writers[name].write(tmp_path, version)
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert made and found - given <= made
    assert made - found <= {NEXT}


def test_a_policy_is_old_or_new_before_every_line_of_its_saving(
    writers: dict[str, Writer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the disk survives; this is about the process
    points, wrong = kill_at_every_step(writers["a policy"], tmp_path, SAVING)
    assert points > 10 and wrong == []


@pytest.mark.parametrize("name", ["a policy", "an exported model", "results of bench"])
def test_killed_at_random_it_leaves_the_old_or_the_new(writers: dict[str, Writer], name: str, tmp_path: Path) -> None:
    writers[name].write(tmp_path, 0)
    chance = random.Random(name)
    assert [kill_somewhere(writers[name], tmp_path, 0.02, chance) for _ in range(3)] == [None] * 3


def test_who_reads_a_policy_while_it_is_written_finds_one(writers: dict[str, Writer], tmp_path: Path) -> None:
    reads, wrong = watch(writers["a policy"], tmp_path, 0.5)
    assert reads > 3 and wrong == []


def test_a_policy_that_was_being_saved_is_there_although_nobody_finished(tmp_path: Path) -> None:
    """The old pair beside the new one in a file of its own, as a kill leaves them."""
    writer = policies()
    writer.write(tmp_path, 1)
    old = tmp_path / "old"
    shutil.copytree(tmp_path / "p", old)
    writer.write(tmp_path, 2)
    both = {"format": "pt", "card": (tmp_path / "p" / CARD).read_text()}
    save_file(load_file(tmp_path / "p" / WEIGHTS), old / NEXT, both)
    assert load_policy(old)[1].trained_on.updates == 2
    (old / NEXT).write_bytes(b"x" * 100)
    with pytest.raises(PolicyError, match=r"\.policy\.next: not a policy"):
        load_policy(old)


@pytest.mark.parametrize("opened", [CARD, WEIGHTS])
def test_a_reader_that_is_overtaken_looks_again(tmp_path: Path, opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole other policy is saved as soon as the reader has opened one of the files."""
    writer, folder, whole = policies(), tmp_path / "p", os.open
    writer.write(tmp_path, 1)
    left = [3]

    def overtaken(path: Any, *args: Any, **options: Any) -> int:
        handle = whole(path, *args, **options)
        if str(path) == str(folder / opened) and left[0]:
            left[0] -= 1
            with monkeypatch.context() as alone:
                alone.setattr(os, "open", whole)
                writer.write(tmp_path, 4 - left[0])
        return handle

    monkeypatch.setattr(os, "open", overtaken)
    assert writer.read(tmp_path) == 4


def test_a_saved_policy_is_two_files(tmp_path: Path) -> None:
    policies().write(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [CARD, WEIGHTS]


# Single files.


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    contents = [bytes([number]) * 200_000 for number in range(6)]
    threads = [
        threading.Thread(target=lambda content=content: [write_file(tmp_path / "a", content) for _ in range(8)])
        for content in contents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "a").exists():
            assert (tmp_path / "a").read_bytes() in contents
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "a", "new")
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_was_written_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_file(tmp_path / "a", "new")
    assert done == ["file", "rename", "folder"]
    done.clear()
    write_files(tmp_path, {"a": b"", "b": b""})
    assert done == ["file", "file", "rename", "rename", "folder"]


def test_links_stay_links_and_modes_stay(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    write_file(tmp_path / "far" / "a", "old")
    (tmp_path / "far" / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("far/a")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "a").read_text() == "new"
    assert (tmp_path / "far" / "a").stat().st_mode & 0o777 == 0o640


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As `--json /dev/stdout` may be one."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "said")
    assert os.read(reader, 100) == b"said" and not (tmp_path / "pipe").is_file()
    os.close(reader)


# Folders.


def test_a_folder_that_is_exchanged_keeps_what_else_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_text("kept")
    (folder / "log").write_text("kept")
    (folder / "link").symlink_to("log")
    write_together(folder, {"weights": b"1", "config": b"1"})
    inode, log = folder.stat().st_ino, (folder / "log").open("a")
    write_together(folder, {"weights": b"2", "config": b"2"})
    assert folder.stat().st_ino != inode, "it took the place of the other in one step"
    with log:
        log.write(" and open")
    assert sorted(path.name for path in folder.iterdir()) == ["config", "link", "log", "sub", "weights"]
    assert (folder / "log").read_text() == "kept and open" and (folder / "sub" / "a").read_text() == "kept"
    assert (folder / "link").is_symlink() and (folder / "config").read_bytes() == (folder / "weights").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EINVAL, errno.ENOSYS, errno.EXDEV])
def test_where_folders_cannot_be_exchanged_a_kill_leaves_no_mixture(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(one: Path, other: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic, "_exchange", refused)
    folder = tmp_path / "m"
    write_together(folder, {"weights": b"1", "config": b"1"})
    write_together(folder, {"weights": b"2", "config": b"2"})
    assert (folder / "config").read_bytes() == (folder / "weights").read_bytes() == b"2"
    seen: list[tuple[bool, bytes]] = []
    rename = Path.replace

    def renamed(path: Path, target: Path) -> Path:
        if target.parent == folder:
            seen.append(((folder / "config").exists(), (folder / "weights").read_bytes()))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", renamed)
    write_together(folder, {"weights": b"3", "config": b"3"})
    assert seen == [(False, b"2"), (False, b"3")], "what makes it a model is away while the rest changes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_other_errors_of_an_exchange_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(one: Path, other: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(atomic, "_exchange", failing)
    write_together(tmp_path / "m", {"config": b"1"})
    with pytest.raises(OSError, match="Input/output"):
        write_together(tmp_path / "m", {"config": b"2"})
    assert (tmp_path / "m" / "config").read_bytes() == b"1"


# Several writers.


def at_once(*works: Callable[[], object]) -> list[BaseException]:
    """What was raised by works that ran at the same time."""
    raised: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("name", ["files together", "a policy"])
def test_writers_of_one_folder_wait_for_each_other(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    writer = policies() if name == "a policy" else next(each for each in plain_writers() if each.name == name)
    writer.write(tmp_path, 0)
    found: set[int] = set()

    def write(version: int) -> None:
        for _ in range(6):
            writer.write(tmp_path, version)
            found.add(writer.read(tmp_path) if name == "a policy" else version)

    assert at_once(*(lambda version=version: write(version) for version in (1, 2, 3))) == []
    assert {writer.read(tmp_path), *found} <= {1, 2, 3}
    assert [path.name for path in tmp_path.iterdir()] in (["m"], ["p"])


def test_a_folder_is_not_exchanged_while_a_file_in_it_is_written(tmp_path: Path) -> None:
    folder, sub = tmp_path / "m", tmp_path / "m" / "sub"
    sub.mkdir(parents=True)
    write_together(folder, {"config": b"1"})
    for place in (folder, sub):
        export = threading.Thread(target=write_together, args=(folder, {"config": b"2"}))
        inode = folder.stat().st_ino

        def rows(export: threading.Thread = export, inode: int = inode) -> str:
            export.start()
            export.join(0.2)
            assert export.is_alive() and folder.stat().st_ino == inode
            return "rows"

        write_file(place / "rows", rows)
        export.join()
        assert folder.stat().st_ino != inode and (place / "rows").read_text() == "rows"


def test_what_programs_without_locks_write_into_a_folder_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, exchange = tmp_path / "m", atomic._exchange
    write_together(folder, {"weights": b"1", "config": b"1"})
    (folder / "log").write_text("old")

    def late(one: Path, other: Path) -> None:
        (folder / "sub").mkdir()
        for name in ("new", "sub/new", "weights"):
            (folder / name).write_text("late")
        (folder / "next").write_text("late")
        (folder / "next").replace(folder / "log")
        exchange(one, other)

    monkeypatch.setattr(atomic, "_exchange", late)
    write_together(folder, {"weights": b"2", "config": b"2"})
    assert {(folder / name).read_text() for name in ("new", "sub/new", "log")} == {"late"}
    assert (folder / "weights").read_bytes() == (folder / "config").read_bytes() == b"2"


def test_a_writer_that_waited_has_the_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, exchange = tmp_path / "m", atomic._exchange
    write_together(folder, {"config": b"1"})
    waited: list[bool] = []

    def rows() -> str:
        export.start()
        export.join(0.2)
        waited.append(export.is_alive())
        return "rows"

    export = threading.Thread(target=write_together, args=(folder, {"other": b"3", "config": b"3"}))
    writer = threading.Thread(target=write_file, args=(folder / "rows", rows))

    def slow(one: Path, other: Path) -> None:
        monkeypatch.setattr(atomic, "_exchange", exchange)
        writer.start()
        writer.join(0.2)
        waited.append(writer.is_alive())
        exchange(one, other)

    monkeypatch.setattr(atomic, "_exchange", slow)
    write_together(folder, {"config": b"2"})
    writer.join()
    export.join()
    assert waited == [True, True]
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"rows": b"rows", "config": b"3", "other": b"3"}


def test_rows_of_several_runs_are_all_kept(tmp_path: Path) -> None:
    def add(number: int) -> None:
        for seed in range(5 * number, 5 * number + 5):
            add_row(tmp_path / "rows.json", Results(model="m", digest="d", dtype="float32"), row(seed))

    assert at_once(*(lambda number=number: add(number) for number in range(3))) == []
    found = open_results(tmp_path / "rows.json", Results(model="m", digest="d", dtype="float32")).rows
    assert sorted(each.seed for each in found) == list(range(15))
