"""The file that keeps measurements: one model, one row a trial, each row written as soon as it is measured."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from policies.evaluation.measure import Measurement, Trial
from policies.files.atomic import write_file
from policies.files.regular import open_regular, read_file

MOST_BYTES = 64 << 20


class Results(BaseModel):
    """All rows measured on one model. `digest` is of the model's files, `dtype` what it computed in."""

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
    """A results file that these rows cannot go into. One line that says why and what to do."""


def open_results(path: Path | None, fresh: Results) -> Results:
    """What `path` holds, to be added to, or `fresh` where there is no such file yet.

    Raises ResultsError if the file is none of ours or measures another model.
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

    Rows that another run has added to the file meanwhile are kept, and taken over. Raises ResultsError, OSError.
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
