"""Tasks on lists of numbers: sort, reverse, running totals."""

import random
from abc import abstractmethod
from itertools import accumulate

from policies.tasks.base import Problem, Task


def words(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


class ListTask(Task):
    """A prompt `instruction: numbers`, answered by `lead: numbers`; all numbers must be right, the rest is free."""

    instruction: str
    lead: str
    gen_length = 16
    size: tuple[int, int]

    def numbers(self, rng: random.Random, count: int) -> list[int]:
        return rng.sample(range(100), count)

    @abstractmethod
    def solve(self, numbers: list[int]) -> list[int]:
        """Numbers of the answer."""

    def sample(self, rng: random.Random) -> Problem:
        numbers = self.numbers(rng, rng.randint(*self.size))
        answer = words(self.solve(numbers))
        return Problem(
            self.name, words(numbers), f"{self.instruction}: {words(numbers)}", answer, f"{self.lead}: {answer}"
        )

    def check(self, problem: Problem, completion: str) -> bool:
        return completion.rpartition(":")[2].split() == problem.answer.split()


class Sort(ListTask):
    name = "sort"
    description = "five to twelve different numbers below 100 to put in order, the smallest first"
    instruction, lead = "Sort these numbers", "Sorted"
    size = (5, 12)

    def solve(self, numbers: list[int]) -> list[int]:
        return sorted(numbers)


class Reverse(ListTask):
    name = "reverse"
    description = "five to twelve numbers below 100 to write backwards: every position is certain from the start"
    instruction, lead = "Reverse these numbers", "Reversed"
    size = (5, 12)

    def solve(self, numbers: list[int]) -> list[int]:
        return numbers[::-1]


class Totals(ListTask):
    name = "totals"
    description = "running totals of five to ten digits: each needs the one before"
    instruction, lead = "Add these numbers up", "Totals"
    size = (5, 10)

    def numbers(self, rng: random.Random, count: int) -> list[int]:
        return [rng.randint(1, 9) for _ in range(count)]

    def solve(self, numbers: list[int]) -> list[int]:
        return list(accumulate(numbers))
