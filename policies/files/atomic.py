"""Writing that is all or nothing: whoever is killed, at any point, leaves the old content or the new one.

Content goes to a place of its own beside the old one and to the disk, and then takes the old one's name in one step.
What a killed writer leaves in that place is overwritten by the next one. Writers of one file or folder wait for each
other; some network file systems have no locks, and there it is up to users to have one writer at a time.
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
"""Errors where a folder cannot change places with another: it is a mount, or its file system knows no such thing."""


def write_file(path: Path, content: bytes | str | Callable[[], str]) -> None:
    """Write a whole file in the place of the one that is there, if any; text as UTF-8. Raises OSError.

    A link stays one: the file that it leads to is replaced. A pipe or a device has no content to keep and is written
    to directly.

    Args:
        content: or what makes it of the old one, while no other writer changes that.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(_bytes(content))
        return
    with held(path.parent):
        write_files(path.parent, {path.name: content})


def write_files(folder: Path, contents: Mapping[str, bytes | str | Callable[[], str]]) -> None:
    """Write several files, each whole or not at all, in this order; all are ready before the first is seen.

    The folder is to be `held` meanwhile.
    """
    with ExitStack() as stack:
        ready = {name: stack.enter_context(_ready(folder / name, content)) for name, content in contents.items()}
        for name, partial in ready.items():
            partial.replace(folder / name)
    flush(folder)


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a folder, all of them or none; what else is in it stays. Raises OSError.

    The last one is what makes the folder what it is: without it, the others are nothing to anybody. So where it is not
    there yet it is written last, and that is all. Else a folder with the new files, and links to all others, changes
    places with the old one. Where that cannot be (see `NOT_HERE`), the last file is away meanwhile: a kill then leaves
    nothing that could be taken for either version.
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
    """Have a file's content, or a folder's names, on the disk when this returns."""
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
    """A file's new content beside it, to be renamed; other writers of the same file wait until that is done."""
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
    """An empty file of this name, which no other writer has; its descriptor."""
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
            # Whoever waits for this folder then waits for the one that takes its place, until the old one is gone.
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
    """Have links in another folder to all that is in this one, but for some names in it. Raises OSError, Error."""
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
    """The inodes of all that is no folder, by place."""
    paths = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):  # others may remove what they like
            found[path.relative_to(folder)] = path.lstat().st_ino
    return found


def _carry(old: Path, folder: Path, before: Mapping[Path, int], but: Collection[str]) -> None:
    """Take over what programs that know nothing of locks have put into the old folder since links to all were made."""
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
