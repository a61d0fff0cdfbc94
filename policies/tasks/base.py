"""Tasks: families of problems with checkable answers, split into training and held-out by construction."""

import random
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

Split = Literal["train", "heldout"]
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        key: the problem without its free wording; it decides the split, so that paraphrases stay on one side.
        prompt: exactly the text that goes to the model.
        reference: one right response.
    """

    task: str
    key: str
    prompt: str
    answer: str
    reference: str


def split_of(key: str) -> Split:
    """The split of a problem, from a checksum of its key, so that the two sets cannot overlap."""
    return "heldout" if zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0 else "train"


class Task(ABC):
    """A family of problems that a program can generate and check.

    Attributes:
        gen_length: tokens of the embedded tokenizer that hold every response, end-of-text included.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    gen_length: ClassVar[int]

    @abstractmethod
    def sample(self, rng: random.Random) -> Problem:
        """Draw one problem of either split."""

    @abstractmethod
    def check(self, problem: Problem, completion: str) -> bool:
        """True if a completion answers the problem. Never raises, whatever the text."""

    def interchangeable(self) -> tuple[tuple[str, ...], ...]:
        """Groups of words that may replace each other in a right response."""
        return ()

    def solutions(self, problem: Problem) -> list[str]:
        """All right responses, up to interchangeable words."""
        return [problem.reference]

    def count(self, split: Split) -> int | None:
        """Number of problems of a split; None if they are generated without end."""
        return None

    def draw(self, rng: random.Random, split: Split) -> Problem:
        """Draw one problem of the given split."""
        while split_of((problem := self.sample(rng)).key) != split:
            pass
        return problem

    def problems(self, count: int, seed: int, split: Split) -> list[Problem]:
        """Draw `count` different problems of the given split, the same for the same seed.

        Raises ValueError if there are too few.
        """
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
