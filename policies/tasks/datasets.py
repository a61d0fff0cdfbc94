"""Two public benchmarks of mathematics, read from their published files: GSM8K and MATH.

The prompt asks for reasoning and then the answer in a box, without examples, and ends where the reasoning begins, as
the paper evaluates (arXiv 2512.09106).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import field_validator

from policies.tasks.answers import answer_math, answer_number, boxed, equal_numbers, first_number, hashed
from policies.tasks.base import Problem
from policies.tasks.files import Entries, Entry, FileTask, entry_key
from policies.tasks.latex import normal_form
from policies.tasks.records import Filled, Record, read_folder, read_lines

INSTRUCTION = r"""Solve the problem below step by step, and give the final answer in \boxed{}. Reply in this form:
<reasoning>
your steps
</reasoning>
<answer>
\boxed{your answer}
</answer>

Problem: """


def boxed_entry(question: str, answer: str, solution: str) -> Entry:
    """Make a problem whose response reasons and then puts the answer into a box."""
    return Entry(
        key=entry_key(question),
        prompt=f"{INSTRUCTION}{question.strip()}\n\n<reasoning>",
        answer=answer,
        reference=f"\n{solution.strip()}\n</reasoning>\n<answer>\n\\boxed{{{answer}}}\n</answer>",
    )


class GSM8KRecord(Record):
    """A line of GSM8K; the answer shows the steps, with calculations as `<<2*3=6>>`, and ends in `#### NUMBER`."""

    question: Filled
    answer: str

    @field_validator("answer")
    @classmethod
    def _has_a_number(cls, value: str) -> str:
        if first_number(hashed(value) or "") is None:
            raise ValueError("does not end in '#### NUMBER'")
        return value


class GSM8K(FileTask):
    """GSM8K (Cobbe et al., arXiv 2110.14168) as its authors' JSONL: `question`, `answer`. See `FileTask`."""

    name = "gsm8k"
    description = "word problems of grade-school mathematics; the number in the box is judged"

    def _entries(self, path: Path) -> Iterator[Entry]:
        for _, record in read_lines(path, GSM8KRecord):
            steps = re.sub(r"<<[^<>]*>>", "", record.answer).rpartition("####")[0]
            yield boxed_entry(record.question, hashed(record.answer) or "", steps)

    def check(self, problem: Problem, completion: str) -> bool:
        return equal_numbers(answer_number(completion), first_number(problem.answer))


class MATHRecord(Record):
    """A problem of MATH. Without an `answer`, the content of the solution's last box is the answer."""

    problem: Filled
    solution: str = ""
    answer: Filled | None = None


class MATH(FileTask):
    """MATH (Hendrycks et al., arXiv 2103.03874): `problem`, `solution` and in some editions `answer`.

    Either JSONL, or a folder of the authors' JSON files. A `path` with folders `train` and `test` keeps that split.
    See `FileTask`.
    """

    name = "math"
    description = "competition mathematics; the formula in the box is judged, after normalisation"

    def _split(self, path: Path) -> tuple[Entries, Entries]:
        train, test = path / "train", path / "test"
        if train.is_dir() and test.is_dir():
            return self._unique(train), self._unique(test)
        return super()._split(path)

    def _entries(self, path: Path) -> Iterator[Entry]:
        read = read_folder if path.is_dir() else read_lines
        for where, record in read(path, MATHRecord):
            answer = record.answer or boxed(record.solution)
            if not answer:
                raise ValueError(f"{where}: solution: has no \\boxed{{}} with an answer, and there is no field answer")
            entry = boxed_entry(record.problem, answer.strip(), record.solution)
            if boxed(entry.reference) != entry.answer:
                raise ValueError(f"{where}: answer: has braces without a partner")
            yield entry

    def check(self, problem: Problem, completion: str) -> bool:
        found = answer_math(completion)
        return found is not None and normal_form(found) == normal_form(problem.answer)
