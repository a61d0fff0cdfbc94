"""Reading of a model folder's files: regular files only, with a size limit for each kind."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from policies.files.regular import read_file

MAX_JSON, MAX_INDEX, MAX_TOKENIZER, MAX_TEMPLATE = 8 << 20, 64 << 20, 128 << 20, 1 << 20
"""Size limits in bytes: ten times the largest published files for JSON and indexes, three times for tokenizers."""
MAX_MESSAGE = 1000
INDEX = "model.safetensors.index.json"


class ModelError(Exception):
    """A model that cannot be served. The message is one line, whatever a file holds: the file and the problem."""

    def __init__(self, message: str) -> None:
        half = MAX_MESSAGE // 2
        short = message if len(message) <= MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}"
        super().__init__(re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", short).strip())


def read_bytes(path: Path, most: int) -> bytes:
    """Content of a file. Raises ModelError if it is missing, not a regular file or longer than `most` bytes."""
    with readable(path):
        return read_file(path, most)


def read_text(path: Path, most: int) -> str:
    """Text of a file. Raises ModelError like `read_bytes`, and for invalid UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """JSON object in a file. Raises ModelError if the file is missing or contains no object."""
    content = read_bytes(path, most)
    if not content.strip():
        raise ModelError(f"{path}: the file is empty")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # invalid JSON and invalid UTF-8 are ValueErrors
        raise ModelError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """JSON object in a file; empty if the file does not exist. Raises ModelError if it contains no object.

    A dangling link counts as an unreadable file, not as a missing one.
    """
    return read_json(path) if is_there(path) else {}


def is_there(path: Path) -> bool:
    """True if a file or link exists, dangling links included. Raises ModelError if that cannot be determined."""
    with readable(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Turn OSErrors while reading into ModelErrors that name the file, or `place` if the error has none."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or place}: {error.strerror or error}") from None


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise ModelError if a file is replaced while others beside it are read."""
    with readable(path):
        before = path.stat()
    yield
    with readable(path):
        after = path.stat()
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
        raise ModelError(f"{path.parent}: another model was written here while this one was read")


def other_forms(folder: Path) -> str:
    """Note on weights of other formats in a folder, to end an error message; empty if there are none."""
    with readable(folder):
        names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return "; adapter_config.json belongs to an adapter: merge it into its model first"
    if shards := [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]:
        return f", and no {INDEX} for {shards[0]}"
    if others := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".npz"))]:
        return f"; {others[0]} is not read, only safetensors are"
    if named := [name for name in names if name.endswith(".safetensors")]:
        return f"; {named[0]} is not one of transformers' names"
    return ""
