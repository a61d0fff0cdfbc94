"""Bounded reading of files from users: regular files only, and never more bytes than expected.

A named pipe, a device or a link to one in the place of a file would block its reader, or never end.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

MOST_HEADER = 32 << 20
"""Bytes of a safetensors file's header. That of a hundred thousand tensors is some 10 MB."""
MOST_LISTED, MOST_WORD = 100, 1024
"""Most entries of a list, and characters of a name, in file content that appears again in answers."""
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class UnsuitableFileError(OSError):
    """A file of the wrong kind or size; `filename` and `strerror` say which and why."""

    def __init__(self, path: Path | str, why: str) -> None:
        super().__init__(None, why, str(path))


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading. Raises OSError."""
    # Not blocking: opening a pipe would wait for a writer. The kind is that of the opened file, not of the path.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UnsuitableFileError(path, "a socket, or a device that is not there, not a file") from None
        raise
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            kind = KINDS.get(stat.S_IFMT(mode))
            raise UnsuitableFileError(path, os.strerror(errno.EISDIR) if kind is None else f"{kind}, not a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes. Raises OSError."""
    with open_regular(path) as file:
        return read_open(file, path, most)


def read_open(file: BufferedReader, path: Path, most: int) -> bytes:
    """Read an open file of at most `most` bytes. Raises OSError."""
    size = os.fstat(file.fileno()).st_size
    content = b"" if size > most else file.read(most + 1)  # it may grow, and some of the system's own say 0
    if max(size, len(content)) > most:
        raise UnsuitableFileError(path, f"more than {most} bytes")
    return content


def read_text(path: Path, most: int) -> str:
    """Read a regular file of UTF-8 text, at most `most` bytes. Raises OSError, UnicodeDecodeError."""
    return read_file(path, most).decode("utf-8")


def check_safetensors(path: Path, most_header: int = MOST_HEADER) -> None:
    """Check the stated length of a safetensors file's header, which libraries trust.

    Raises OSError if it is not a regular file, ValueError if it cannot be a safetensors file.
    """
    with open_regular(path) as file:
        check_header(file.read(8), os.fstat(file.fileno()).st_size, most_header)


def check_header(start: bytes, size: int, most_header: int = MOST_HEADER) -> None:
    """Check a header as `check_safetensors` does, given the first 8 bytes of a file and its size in bytes."""
    if len(start) < 8:
        raise ValueError("the header is not all there")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    if length > most_header:
        raise ValueError(f"a header of {length} bytes, more than {most_header}")
