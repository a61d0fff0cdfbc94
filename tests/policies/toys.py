"""Environments without a neural model, whose best policy is known."""

import random
from collections.abc import Callable, Sequence
from functools import cache

import torch

from policies.model_under_test import ModelUnderTest
from policies.tasks import Problem, Task
from samplers import Canvas, Prediction, Statistic
from samplers.forward.query import Query

MASK_ID, RIGHT, WRONG = 0, 1, 2
LENGTH, LEVELS = 16, 4


class ReadySet(Task):
    """Positions on levels 0 ... 3: one is surely right once nothing of a lower level is masked, else by luck.

    The best policy commits a level a forward: 4 forwards, always right.
    """

    name = "ready-set"
    description = "commit what is ready"
    gen_length = LENGTH

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def sample(self, rng: random.Random) -> Problem:
        number = str(rng.randrange(10**6))
        return Problem(self.name, number, number, "", f"={str(RIGHT) * self.length}")

    def check(self, problem: Problem, completion: str) -> bool:
        return completion == str(RIGHT) * self.length

    def subject(self, luck: float) -> ModelUnderTest:
        """The model: `luck` is the chance that a position that is not ready comes out right."""

        def answers(canvas: Canvas) -> Callable[[int], tuple[int, float]]:
            number, masked = int(canvas.tokens[0]), canvas.masked.tolist()
            levels, count = levels_of(number, len(masked)), sum(masked)
            lowest = min((level for level, m in zip(levels, masked, strict=True) if m), default=LEVELS)

            def answer(position: int) -> tuple[int, float]:
                one, other = draws(number, position, count)
                if levels[position] <= lowest:
                    return RIGHT, 0.8 + 0.2 * one
                return RIGHT if one < luck else WRONG, 0.2 + 0.5 * other

            return answer

        def predict(query: Query) -> Prediction:
            each = [answers(canvas) for canvas in query.canvases]
            asked = zip(query.row.tolist(), query.position.tolist(), strict=True)
            found = [each[row](position - 1) for row, position in asked]
            confidence = torch.tensor([confidence for _, confidence in found])
            extra = {name: torch.zeros(len(found)) for name in Statistic if name in query.wanted.statistics}
            top = torch.nn.functional.pad(confidence[:, None], (0, query.wanted.top - 1)) if query.wanted.top else None
            return Prediction(torch.tensor([token for token, _ in found]), confidence, extra, top)

        return ModelUnderTest(predict, encode, decode, MASK_ID, frozenset(), 1 + LENGTH)


@cache
def levels_of(number: int, length: int) -> list[int]:
    """The level of each position of a problem."""
    levels = [i % LEVELS for i in range(length)]
    random.Random(number).shuffle(levels)
    return levels


@cache
def draws(number: int, position: int, masked: int) -> tuple[float, float]:
    """What chance says of a position, once; to seed a generator takes longer than all else that is done here."""
    rng = random.Random(f"{number}/{position}/{masked}")
    return rng.random(), rng.random()


def encode(text: str) -> list[int]:
    """A prompt is one token; a response, after `=`, one for each digit."""
    return [int(digit) for digit in text[1:]] if text.startswith("=") else [int(text)]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(str, tokens))
