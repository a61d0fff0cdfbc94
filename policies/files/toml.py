"""TOML files, with errors of one line."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from policies.files.regular import read_text

MOST_BYTES = 4 << 20

M = TypeVar("M", bound=BaseModel)


class TomlTable(BaseModel):
    """Base class of a table: unknown keys are errors, and values are fixed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_toml(path: Path, model: type[M]) -> tuple[M, dict[str, Any]]:
    """Read a file as a model, and its plain content. Raises ValueError with one line that names file and field."""
    try:
        content = tomllib.loads(read_text(path, MOST_BYTES))
        return model.model_validate(content), content
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise ValueError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError
        raise ValueError(f"{path}: not a TOML file: {error}") from None
