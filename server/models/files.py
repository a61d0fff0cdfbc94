"""Reading the files of a model folder: regular ones only, and of each no more than its kind may have."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from policies.files.regular import read_file

MOST_JSON, MOST_INDEX, MOST_TOKENIZER, MOST_TEMPLATE = 8 << 20, 64 << 20, 128 << 20, 1 << 20
"""Bytes. The largest that are published have about a tenth of the first two, and a third of a tokenizer's."""
MOST_MESSAGE = 1000
INDEX = "model.safetensors.index.json"


class ModelError(Exception):
    """A model that cannot be served. One line, whatever a file says: which file, and what is wrong with it."""

    def __init__(self, message: str) -> None:
        half = MOST_MESSAGE // 2
        short = message if len(message) <= MOST_MESSAGE else f"{message[:half]} ... {message[-half:]}"
        super().__init__(re.sub(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", short).strip())


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a file. Raises ModelError if there is none, if it is no regular one or has more than `most`."""
    with readable(path):
        return read_file(path, most)


def read_text(path: Path, most: int) -> str:
    """The text of a file, likewise. Raises ModelError, also if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json(path: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if there is no file or no object in it."""
    content = read_bytes(path, most)
    if not content.strip():
        raise ModelError(f"{path}: the file is empty")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise ModelError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file. Raises ModelError if it is no object.

    A link that leads nowhere is a file that cannot be read, not one that was left out.
    """
    return read_json(path) if is_there(path) else {}


def is_there(path: Path) -> bool:
    """Whether there is a file, or a link, also one that leads nowhere. Raises ModelError if that cannot be known."""
    with readable(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Tell what the system refuses while files are read as a ModelError about the file, or about this place."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or place}: {error.strerror or error}") from None


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise ModelError if a file has become another one while others beside it were read."""
    with readable(path):
        before = path.stat()
    yield
    with readable(path):
        after = path.stat()
    if (before.st_ino, before.st_mtime_ns, before.st_size) != (after.st_ino, after.st_mtime_ns, after.st_size):
        raise ModelError(f"{path.parent}: another model was written here while this one was read")


def other_forms(folder: Path) -> str:
    """Weights of another form in a folder, as the end of a message; nothing if there are none."""
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
