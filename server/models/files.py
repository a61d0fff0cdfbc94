"""Reading the JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """A model that cannot be served. One line: which file, what is wrong with it."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if there is no file or no object in it."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        raise ModelError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no such file. Raises ModelError if it is no object."""
    return read_json(path) if path.exists() else {}
