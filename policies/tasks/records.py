"""JSON objects in users' files, with errors that name the place."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from policies.files.regular import open_regular, read_file


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


MOST_LINE = 4 << 20
"""Most bytes of one JSON object."""

Filled = Annotated[str, AfterValidator(_filled)]
"""Text that is not blank."""


class Record(BaseModel):
    """One JSON object. Numbers are read as their text; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_lines(path: Path, kind: type[AnyRecord]) -> Iterator[tuple[str, AnyRecord]]:
    """Read the objects of a file with one per line; yields the place of each, `FILE, line N`, and the object.

    Raises ValueError with one line that names the file, the line and the field.
    """
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MOST_LINE + 1), b""), 1):
                if len(line) > MOST_LINE:
                    raise ValueError(f"{path}, line {number}: more than {MOST_LINE} bytes")
                if text := line.removeprefix(codecs.BOM_UTF8).strip():
                    where = f"{path}, line {number}"
                    yield where, _parse(text, kind, where)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def read_folder(path: Path, kind: type[AnyRecord]) -> Iterator[tuple[str, AnyRecord]]:
    """Read the objects of all `.json` files under a folder, one per file, sorted by path; skips hidden files.

    Raises ValueError as `read_lines` does.
    """
    for file in sorted(path.rglob("[!.]*.json")):
        try:
            yield str(file), _parse(read_file(file, MOST_LINE), kind, str(file))
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from None


def _parse(text: bytes, kind: type[AnyRecord], where: str) -> AnyRecord:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])[:200]
        message = first["msg"].removeprefix("Value error, ").replace(" at line 1 column ", " at column ")
        raise ValueError(f"{where}: {field}{message}") from None
