"""All-or-nothing writes: a writer that is killed, at any point, leaves the old content or the new one.

New content is written and flushed to a file of its own beside the old one, and then renamed over it in one step. What a
killed writer leaves behind there is overwritten by the next one. Writers of one file or folder wait for each other;
some network file systems have no locks, and users must see to it that there is one writer at a time.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

EXCHANGE = 2
"""`RENAME_EXCHANGE` of Linux: two names change places."""
HERE = -100
"""`AT_FDCWD`: names are as the process sees them."""
NOT_HERE = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBUSY,
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EROFS,
    errno.EMFILE,
)
"""Errors of exchanging two folders where that is impossible: a mount, or a file system without this operation."""


def write_file(path: Path, content: bytes | str | Callable[[], str]) -> None:
    """Write a file whole, replacing the one that is there, if any; text as UTF-8. Raises OSError.

    A link stays one: the file that it leads to is replaced. A pipe or a device has no content to keep and is written
    to directly.

    Args:
        content: or a callable that returns it, called while no other writer can change the file.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(_bytes(content))
        return
    with held(path.parent):
        write_files(path.parent, {path.name: content})


def write_files(folder: Path, contents: Mapping[str, bytes | str | Callable[[], str]]) -> None:
    """Write several files, each whole or not at all, in this order; all are ready before the first is seen.

    The caller must hold the folder (see `held`).
    """
    with ExitStack() as stack:
        ready = {name: stack.enter_context(_ready(folder / name, content)) for name, content in contents.items()}
        for name, partial in ready.items():
            partial.replace(folder / name)
    flush(folder)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder, all of them or none; what else is in it stays. Raises OSError.

    The last file is the one that readers look for: without it, they ignore the others. Where it does not exist yet, it
    is simply written last. Otherwise a folder with the new files, and links to all others, changes places with the old
    one. Where that is impossible (see `NOT_HERE`), the last file is removed first: a kill then leaves nothing that can
    be taken for either version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    *_, last = contents
    with held(folder, alone=True):
        if (folder / last).exists():
            try:
                _exchange_for(folder, contents)
                return
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise
            (folder / last).unlink()
            flush(folder)
        write_files(folder, contents)


@contextmanager
def held(folder: Path, alone: bool = False) -> Iterator[None]:
    """Keep a folder from being exchanged, or `alone` from being written into by others at all. Raises OSError."""
    folder = folder.resolve()
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            if _is_at(folder, handle):  # else it was exchanged while this one waited
                yield
                return
        finally:
            os.close(handle)


def flush(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do this for a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def _ready(path: Path, content: bytes | str | Callable[[], str]) -> Iterator[Path]:
    """Write a file's new content beside it, ready to be renamed; other writers of the file wait until then."""
    partial = path.with_name(f".{path.name}.partial")
    with _own(partial) as handle:
        try:
            if path.exists():
                shutil.copymode(path, partial)
            with open(handle, "wb", closefd=False) as file:
                file.write(_bytes(content))
            os.fsync(handle)
            yield partial
        except BaseException:
            if _is_at(partial, handle):
                partial.unlink()
            raise


def _bytes(content: bytes | str | Callable[[], str]) -> bytes:
    content = content() if callable(content) else content
    return content.encode() if isinstance(content, str) else content


@contextmanager
def _own(partial: Path) -> Iterator[int]:
    """Open an empty file of this name that no other writer has open; its descriptor."""
    while True:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_at(partial, handle):  # else the writer before has renamed it while this one waited
                os.ftruncate(handle, 0)
                yield handle
                return
        finally:
            os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _exchange_for(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Let a folder with new files, and links to all others, change places with this one. Raises OSError."""
    if os.path.ismount(folder):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(folder))
    other = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(other, ignore_errors=True)
    try:
        other.mkdir()
        with ExitStack() as stack:
            # Writers that wait for this folder then wait for the one that takes its place, until the old one is gone.
            stack.enter_context(held(other, alone=True))
            stack.callback(shutil.rmtree, other, ignore_errors=True)
            for place, _, _ in os.walk(folder):
                if place != str(folder):
                    stack.enter_context(held(Path(place), alone=True))
            _link_all(folder, other, contents)
            before = _files(other)
            write_files(other, contents)
            flush(folder.parent)
            _exchange(folder, other)
            _carry(other, folder, before, contents)
            flush(folder.parent)
    except shutil.Error as error:  # several of other files; the first one says enough
        source, _, why = error.args[0][0]
        raise OSError(errno.EXDEV, str(why), str(source)) from None


def _link_all(folder: Path, other: Path, but: Collection[str]) -> None:
    """Link everything in this folder, but for some names, into another one. Raises OSError, shutil.Error."""
    ignored, top = shutil.ignore_patterns(*but), str(folder)
    shutil.copytree(
        folder,
        other,
        symlinks=True,
        ignore=lambda place, names: ignored(place, names) if place == top else set(),
        copy_function=lambda source, target: os.link(source, target, follow_symlinks=False),
        dirs_exist_ok=True,
    )


def _files(folder: Path) -> dict[Path, int]:
    """Inodes of everything below a folder but folders, by relative path."""
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):  # others may remove what they like
            found[path.relative_to(folder)] = path.lstat().st_ino
    return found


def _carry(old: Path, folder: Path, before: Mapping[Path, int], but: Collection[str]) -> None:
    """Take over what programs without locks have put into the old folder since its files were linked."""
    now = _files(folder)
    for place, inode in _files(old).items():
        if inode != before.get(place) and now.get(place) == before.get(place) and str(place) not in but:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (old / place).replace(folder / place)


def _exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one))
    if renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one))
