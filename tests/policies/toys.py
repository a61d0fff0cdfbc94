"""Environments without a neural model, whose best policy is known."""

import random
from collections.abc import Sequence

import torch

from policies.subject import Subject
from policies.tasks import Problem, Task
from samplers import Canvas, Prediction, Statistic
from samplers.denoising import Query

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

    def levels(self, number: int) -> list[int]:
        rng = random.Random(number)
        levels = [i % LEVELS for i in range(self.length)]
        rng.shuffle(levels)
        return levels

    def subject(self, luck: float) -> Subject:
        """The model: `luck` is the chance that a position that is not ready comes out right."""

        def answer(canvas: Canvas, position: int) -> tuple[int, float]:
            number = int(canvas.tokens[0])
            levels = ReadySet(len(canvas.masked)).levels(number)
            masked = canvas.masked.tolist()
            lowest = min((level for level, m in zip(levels, masked, strict=True) if m), default=LEVELS)
            rng = random.Random(f"{number}/{position}/{sum(masked)}")
            if levels[position] <= lowest:
                return RIGHT, rng.uniform(0.8, 1.0)
            return RIGHT if rng.random() < luck else WRONG, rng.uniform(0.2, 0.7)

        def predict(query: Query) -> Prediction:
            asked = zip(query.row.tolist(), query.position.tolist(), strict=True)
            found = [answer(query.canvases[row], position - 1) for row, position in asked]
            confidence = torch.tensor([confidence for _, confidence in found])
            extra = {name: torch.zeros(len(found)) for name in Statistic if name in query.wanted.statistics}
            top = torch.nn.functional.pad(confidence[:, None], (0, query.wanted.top - 1)) if query.wanted.top else None
            return Prediction(torch.tensor([token for token, _ in found]), confidence, extra, top)

        return Subject(predict, encode, decode, MASK_ID, frozenset(), 1 + LENGTH)


def encode(text: str) -> list[int]:
    """A prompt is one token; a response, after `=`, one for each digit."""
    return [int(digit) for digit in text[1:]] if text.startswith("=") else [int(text)]


def decode(tokens: Sequence[int]) -> str:
    return "".join(map(str, tokens))
