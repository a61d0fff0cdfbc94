"""Told is told: a rule that revises as it likes never changes what was told, and ends within its bound."""

import random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    CacheMode,
    Canvas,
    Sampler,
    SamplerParams,
    Selection,
    Step,
    TokenChoice,
)
from samplers.loop.event import StepEvent
from samplers.loop.row import Row
from samplers.loop.run import run
from tests.samplers.models import MASK, VOCAB, predictor


class Anything(Sampler[SamplerParams]):
    """Commit, replace and mask again at random whatever a rule may, and be done at random."""

    name = "anything"
    revises = True

    def __init__(self, seed: int, whole: bool, steps: int, eager: float) -> None:
        self.random, self.whole_region, self.steps, self.eager = random.Random(seed), whole, steps, eager

    def post_steps(self, params: SamplerParams) -> int:
        return self.steps

    def select(self, step: Step) -> Selection:
        def draw(share: float) -> Tensor:
            shape = step.candidate.shape
            return torch.tensor([self.random.random() < share for _ in range(shape.numel())]).view(shape)

        replace = step.committed & draw(self.eager)
        remask = step.committed & ~replace & draw(self.eager)
        token = torch.tensor([self.random.randrange(1, VOCAB) for _ in range(step.token.numel())])
        done = draw(0.5)[:, 0]
        return Selection(
            step.candidate & draw(0.6),
            replace=replace if self.random.random() < 0.8 else None,
            remask=remask if self.random.random() < 0.8 else None,
            token=token.view(step.token.shape),
            confidence=torch.full_like(step.confidence, 0.5),
            done=done if self.random.random() < 0.8 else None,
        )


PATTERNS = [
    BIDIRECTIONAL,
    AttentionPattern(shifted=True),
    AttentionPattern(causal_block=4),
    AttentionPattern(causal_block=4, shifted=True),
    AttentionPattern(causal_block=8, fixed=True, shifted=True),
]


@st.composite
def rows(draw: st.DrawFn) -> Row:
    pattern = draw(st.sampled_from(PATTERNS))
    prompt = draw(st.lists(st.integers(0, VOCAB - 1), max_size=6))
    block = draw(st.sampled_from([None, 4])) if pattern.causal else draw(st.integers(1, 9))
    canvas = Canvas.blank(prompt, draw(st.integers(1, 14)), MASK, block, pattern=pattern)
    for place in draw(st.sets(st.integers(0, canvas.layout.gen_length - 1), max_size=canvas.layout.gen_length - 1)):
        canvas.masked[place], canvas.generated[place] = False, 5
    return Row(
        canvas,
        Anything(draw(st.integers(0, 999)), draw(st.booleans()), draw(st.integers(0, 4)), draw(st.floats(0, 1))),
        SamplerParams(),
        draw(st.sampled_from([TokenChoice(), TokenChoice(1.0)])),
        seed=draw(st.integers(0, 99)),
        end_ids=draw(st.sampled_from([frozenset[int](), frozenset({7}), frozenset({3, 7, 9})])),
        fill_after_end=draw(st.booleans()),
        cache=draw(st.sampled_from(list(CacheMode))),
        vocabulary=VOCAB,
    )


@settings(max_examples=30)
@given(together=st.lists(rows(), min_size=1, max_size=3))
def test_told_is_told(together: list[Row]) -> None:
    """And no question is ever empty: `predictor` sees to that."""
    bounds = [
        sum(2 * row.canvas.layout.block_size(b) + row.sampler.post_steps(row.params) for b in range(layout.blocks))
        for row in together
        for layout in [row.canvas.layout]
    ]
    texts: dict[int, list[int]] = {id(row): list(row.told) for row in together}
    given_places = [row.given.clone() for row in together]
    for turn in run(together, predictor()):
        for row, event in turn:
            check(row, event, texts)
    for row, bound, place in zip(together, bounds, given_places, strict=True):
        assert row.finished and row.forwards <= bound
        assert (row.canvas.generated[place] == 5).all(), "what was given stays"
        assert row.told == row.canvas.generated[: len(row.told)].tolist()
        assert not row.canvas.masked[: len(row.told)].any()


def check(row: Row, event: StepEvent, texts: dict[int, Any]) -> None:
    assert event.error is None
    before = texts[id(row)]
    assert row.told[: len(before)] == before and event.settled == len(row.told)
    assert all(place >= len(before) for place in event.remasked + event.replaced)
    told = row.told[: row.end]
    assert event.text_tokens == told[len(before) :]
    texts[id(row)] = list(row.told)
    assert row.canvas.generated[: len(row.told)].tolist() == row.told
