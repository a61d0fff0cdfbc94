"""Problems from a user's own file: prompts with answers, and a checker to compare them."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from policies.tasks.answers import CHECKERS
from policies.tasks.base import Problem
from policies.tasks.files import Entry, FileTask, entry_key, file_stem
from policies.tasks.records import Filled, Record, read_lines


class PromptRecord(Record):
    """A line: the prompt, the answer, and a right response if it is more than the answer."""

    prompt: Filled
    answer: Filled
    reference: Filled | None = None


class PromptFile(FileTask):
    """Problems of a JSONL file with `prompt`, `answer` and, if it is longer, a right response as `reference`.

    Args:
        checker: name of the comparison of completions with answers, one of `CHECKERS`. For the others see `FileTask`.
    """

    name = "file"
    description = "prompts and answers of a user's own"
    options: ClassVar[tuple[str, ...]] = (*FileTask.options, "checker")

    def __init__(
        self,
        path: str | None = None,
        *,
        train: str | None = None,
        heldout: str | None = None,
        checker: str = "exact",
    ) -> None:
        if checker not in CHECKERS:
            raise ValueError(f"unknown checker {checker!r}; choose from {', '.join(CHECKERS)}")
        self.checker = checker
        super().__init__(path, train=train, heldout=heldout)

    def _kind(self) -> str:
        return f"{super()._kind()}, {self.checker}"

    def _label(self, path: Path) -> str:
        return file_stem(path)

    def _entries(self, path: Path) -> Iterator[Entry]:
        for where, record in read_lines(path, PromptRecord):
            reference = record.reference or record.answer
            if not CHECKERS[self.checker](reference, record.answer):
                field = "answer" if record.reference is None else "reference"
                raise ValueError(f"{where}: {field}: checker {self.checker!r} does not take it for a right response")
            yield Entry(entry_key(record.prompt), record.prompt, record.answer, reference)

    def check(self, problem: Problem, completion: str) -> bool:
        return CHECKERS[self.checker](completion, problem.answer)
