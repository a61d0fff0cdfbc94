"""Base class of tasks whose problems come from users' files."""

import hashlib
import json
import random
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import ClassVar

from policies.tasks.base import Problem, Split, Task, split_of

Entries = dict[str, "Entry"]
"""Entries of one split by key."""


@dataclass(frozen=True)
class Entry:
    """A problem as it is in a file. `key` decides the split; problems with the same key are the same."""

    key: str
    prompt: str
    answer: str
    reference: str


class FileTask(Task):
    """Problems from files, read when the task is made; of problems with the same key the first one counts.

    The class is named for the kind of file. Each task's name ends in a checksum of its problems, so that measurements
    on other files are never taken for its own.

    Args:
        path: one file, split as generated problems are (see `split_of`).
        train, heldout: instead of `path` a file for each split, or for one of them. What is in both is held out.

    Raises ValueError with one line that names the file, the line and the field.
    """

    gen_length = 256
    options: ClassVar[tuple[str, ...]] = ("path", "train", "heldout")
    """Names of the arguments that a task's spec may give."""

    def __init__(self, path: str | None = None, *, train: str | None = None, heldout: str | None = None) -> None:
        if (path is None) == (train is None and heldout is None):
            raise ValueError(f"{type(self).name} needs either path=FILE, or train=FILE and heldout=FILE or one of them")
        if path is not None:
            taught, kept = self._split(_expand(path))
        else:
            taught, kept = (self._unique(_expand(file)) if file is not None else {} for file in (train, heldout))
        taught = {key: entry for key, entry in taught.items() if key not in kept}
        content = json.dumps([self._kind(), *([astuple(entry) for entry in part.values()] for part in (taught, kept))])
        label = self._label(Path(next(file for file in (path, heldout, train) if file is not None)))
        # The base class has one name for all tasks of a class.
        self.name = f"{label}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"  # type: ignore[misc]
        self._problems: dict[Split, list[Problem]] = {"train": self._made(taught), "heldout": self._made(kept)}

    @abstractmethod
    def _entries(self, path: Path) -> Iterator[Entry]:
        """The problems of a file. Raises ValueError with one line that names the file, the line and the field."""

    def _split(self, path: Path) -> tuple[Entries, Entries]:
        """Training and held-out problems of one path."""
        parts: dict[Split, Entries] = {"train": {}, "heldout": {}}
        for key, entry in self._unique(path).items():
            parts[split_of(key)][key] = entry
        return parts["train"], parts["heldout"]

    def _unique(self, path: Path) -> Entries:
        found: Entries = {}
        for entry in self._entries(path):
            found.setdefault(entry.key, entry)
        if not found:
            raise ValueError(f"{path}: has no problems")
        return found

    def _kind(self) -> str:
        """Text that two tasks of the same problems must share to be the same task."""
        return type(self).name

    def _label(self, path: Path) -> str:
        """The task's name before its checksum."""
        return type(self).name

    def _made(self, entries: Entries) -> list[Problem]:
        return [Problem(self.name, e.key, e.prompt, e.answer, e.reference) for e in entries.values()]

    def sample(self, rng: random.Random) -> Problem:
        return rng.choice(self._problems["train"] + self._problems["heldout"])

    def count(self, split: Split) -> int:
        """Number of problems of a split."""
        return len(self._problems[split])

    def draw(self, rng: random.Random, split: Split) -> Problem:
        """Draw one problem of the given split. Raises ValueError if there is none."""
        self._require(1, split)
        return rng.choice(self._problems[split])

    def problems(self, count: int, seed: int, split: Split) -> list[Problem]:
        """Draw `count` different problems of the split, the same for the same seed. Raises ValueError if too few."""
        self._require(count, split)
        shuffled = list(self._problems[split])
        random.Random(f"{self.name}/{split}/{seed}").shuffle(shuffled)
        return shuffled[:count]

    def _require(self, count: int, split: Split) -> None:
        there = len(self._problems[split])
        if count > there:
            raise ValueError(f"task {self.name} has {there} {split} problems, not {count}; ask for fewer or give more")


def entry_key(question: str) -> str:
    """The key of a question, the same whatever its line breaks and runs of spaces."""
    return " ".join(question.split())


def file_stem(path: Path) -> str:
    """A file's name without its ending, reduced to characters fit for a table."""
    return re.sub(r"[^0-9A-Za-z_.]+", "-", path.stem).strip("-") or "file"


def _expand(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None
