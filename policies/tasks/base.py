"""What a task is: problems with checkable answers, split into training and held-out by construction."""

import random
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

Split = Literal["train", "heldout"]
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt` is exactly the text that goes to the model, `reference` one right response to it.

    `key` is the problem without its free wording: it decides the split, so a paraphrase never crosses over.
    """

    task: str
    key: str
    prompt: str
    answer: str
    reference: str


def split_of(key: str) -> Split:
    """The split a problem belongs to, from a checksum of its key: the two sets cannot overlap."""
    return "heldout" if zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0 else "train"


class Task(ABC):
    """A family of problems that a program can generate and check.

    `gen_length` is how many tokens of the embedded tokenizer hold every response of this task, end-of-text included.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    gen_length: ClassVar[int]

    @abstractmethod
    def sample(self, rng: random.Random) -> Problem:
        """One problem of either split."""

    @abstractmethod
    def check(self, problem: Problem, completion: str) -> bool:
        """Whether a completion answers the problem. Any text is accepted as input, none raises."""

    def interchangeable(self) -> tuple[tuple[str, ...], ...]:
        """Groups of words of which any may stand for any other in a right response."""
        return ()

    def solutions(self, problem: Problem) -> list[str]:
        """All right responses up to interchangeable words, where there may be several."""
        return [problem.reference]

    def count(self, split: Split) -> int | None:
        """How many problems of a split there are; None where they are drawn, without end."""
        return None

    def draw(self, rng: random.Random, split: Split) -> Problem:
        """One problem of the given split."""
        while split_of((problem := self.sample(rng)).key) != split:
            pass
        return problem

    def problems(self, count: int, seed: int, split: Split) -> list[Problem]:
        """`count` different problems of the given split; the same for the same seed."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Problem] = {}
        attempts = 0
        while len(found) < count:
            problem = self.draw(rng, split)
            found.setdefault(problem.key, problem)
            attempts += 1
            if attempts > 100 * count + 1000:
                raise ValueError(f"task {self.name} has fewer than {count} different {split} problems; ask for fewer")
        return list(found.values())
