"""Models without weights: what they predict is written down, so what an evaluation must count is known."""

import random
from collections.abc import Callable

import torch

from policies.model_under_test import ModelUnderTest
from policies.tasks import Problem, Task
from samplers import Canvas, Prediction
from samplers.forward.query import Query
from server.models.text.codec import TextCodec
from server.training.tokenizer import build_tokenizer

MASK_ID, END_ID = 0, 1
Answer = Callable[[Canvas, int, list[int]], tuple[int, float]]
"""What is predicted at a position of the generation region, and how surely, given the reference's tokens there."""


def codec(task: Task, problems: list[Problem]) -> TextCodec:
    """A tokenizer with one token a word of these problems and of the task's free words."""
    texts = [text for problem in problems for text in (problem.prompt, *task.solutions(problem))]
    return TextCodec(build_tokenizer(texts + [word for group in task.interchangeable() for word in group]), None, {})


def held_out(task: Task, count: int, seed: int = 0) -> list[Problem]:
    return task.problems(count, seed, "heldout")


class FakeModel:
    """Predicts by `answer`; knows each problem's reference by its prompt. `rows` are the canvases of each forward."""

    def __init__(self, task: Task, problems: list[Problem], answer: Answer, gen_length: int | None = None) -> None:
        self.text = codec(task, problems)
        self.answer = answer
        self.gen_length = gen_length or task.gen_length
        self.references = {tuple(self.text.encode(p.prompt)): self.padded(p.reference) for p in problems}
        self.rows: list[list[int]] = []

    def padded(self, text: str) -> list[int]:
        return (self.text.encode(text) + [END_ID] * self.gen_length)[: self.gen_length]

    def predict(self, query: Query) -> Prediction:
        self.rows.append([canvas.layout.length for canvas in query.canvases])
        answers = []
        for row, position in zip(query.row.tolist(), query.position.tolist(), strict=True):
            canvas = query.canvases[row]
            start = canvas.layout.prompt_length
            reference = self.references[tuple(canvas.tokens[:start].tolist())]
            answers.append(self.answer(canvas, position - start, reference))
        tokens, confidences = zip(*answers, strict=True)
        return Prediction(torch.tensor(tokens), torch.tensor(confidences), {})

    def subject(self, max_length: int = 512) -> ModelUnderTest:
        return ModelUnderTest(
            self.predict, self.text.encode, self.text.decode, MASK_ID, frozenset({END_ID}), max_length
        )


def right(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
    """Always the reference, always as sure."""
    return reference[position], 0.95


def hazy(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
    """Right or wrong and more or less sure by a hash of the canvas as it stands: as irregular as a real model."""
    rng = random.Random(f"{canvas.tokens.tolist()}/{position}")
    return reference[position] if rng.random() < 0.8 else rng.choice((END_ID, 40, 41)), rng.uniform(0.1, 1.0)
