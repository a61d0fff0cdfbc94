"""Results files: measurements of one model, one row per trial, each written as soon as it is measured."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from policies.evaluation.measure import Measurement, Trial
from policies.files.atomic import write_file
from policies.files.regular import open_regular, read_file

MOST_BYTES = 64 << 20


class Results(BaseModel):
    """All measurements of one model. `digest` is of its files, `dtype` the type it computed in."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    digest: str
    dtype: str
    rows: list[Measurement] = []

    def find(self, trial: Trial) -> Measurement | None:
        """The row of this trial, if it was measured."""
        settings = trial.settings()
        return next((row for row in self.rows if row.settings() == settings), None)


class ResultsError(Exception):
    """A results file that cannot take these rows; the message is one line with the reason and the remedy."""


def open_results(path: Path | None, fresh: Results) -> Results:
    """Read the results in `path`, or return `fresh` if there is no such file yet.

    Raises ResultsError if it is not a results file or measures another model.
    """
    if path is None or not path.exists():
        return fresh
    try:
        found = Results.model_validate_json(read_file(path, MOST_BYTES))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "whole file"
        raise ResultsError(f"{path}: not a file of unmask evaluate: {where}: {first['msg']}") from None
    if found.digest != fresh.digest:
        raise ResultsError(f"{path}: measures other model files ({found.model}); choose another --json or delete it")
    if found.dtype != fresh.dtype:
        raise ResultsError(f"{path}: measured in {found.dtype}, not {fresh.dtype}; choose another --json or --dtype")
    return found


def add_row(path: Path | None, results: Results, row: Measurement) -> None:
    """Add a row, and write all rows to `path` if there is one; a kill at any point leaves the old file or the new one.

    Rows that another run added to the file meanwhile are kept, also in `results`. Raises ResultsError, OSError.
    """
    if path is None:
        results.rows.append(row)
        return

    def added() -> str:
        results.rows = [*open_results(path, results).rows, row]
        return results.model_dump_json(indent=1) + "\n"

    write_file(path, added)


def model_digest(folder: Path) -> str:
    """SHA-256 of the files of a model folder that decide what it predicts."""
    digest = hashlib.sha256()
    names = ("config.json", "generation_config.json", "tokenizer.json", "vocab.json", "merges.txt")
    for path in [*(folder / name for name in names), *sorted(folder.glob("model*.safetensors"))]:
        if path.exists():
            digest.update(f"{path.name}\0".encode())
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
