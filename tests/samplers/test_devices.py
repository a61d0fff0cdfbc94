"""The loop on other devices: no tensor of a step is made where torch makes tensors unless told otherwise."""

from typing import Any

import pytest
import torch

from samplers import AttentionPattern, CacheMode, Canvas, Sampler, TokenChoice, get_modifier, list_samplers
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.batch import Batch
from samplers.loop.row import Row
from samplers.loop.run import run
from samplers.resources import bound
from tests.policies import tiny
from tests.samplers.models import MASK, VOCAB, predictor

RULES: list[Sampler] = [bound(each, each.Params()) for each in list_samplers() if each.name != "policy"]
RULES.append(tiny.sampler(region=False))
RULES.append(tiny.sampler(region=True, action="dpls"))


def rows(sampler: Sampler, cache: CacheMode) -> list[Row]:
    pattern = AttentionPattern(noise=VOCAB) if sampler.drafts else AttentionPattern()
    found = []
    for i in range(4):
        canvas = Canvas.blank([5] * (3 + i % 2), 9 + 3 * i, None if sampler.drafts else MASK, 5, pattern=pattern)
        choice = TokenChoice() if sampler.chooses_tokens else TokenChoice(0.7 * (i % 2), 0.9, 5)
        options: dict[str, Any] = {"end_ids": frozenset({7}), "cache": cache, "vocabulary": VOCAB}
        found.append(Row(canvas, sampler, sampler.Params(), choice, seed=i, **options))
    if not sampler.drafts:
        guidance = get_modifier("guidance")
        around = [(guidance, guidance.Params(scale=0.5))]
        found.append(Row(Canvas.blank([5], 7, MASK, 4), sampler, sampler.Params(), modifiers=around))
    return found


@pytest.mark.parametrize("cache", [CacheMode.NONE, CacheMode.DUAL])
@pytest.mark.parametrize("sampler", RULES, ids=lambda sampler: sampler.name)
def test_every_tensor_of_a_step_says_where_it_is(sampler: Sampler, cache: CacheMode) -> None:
    """As it would be on a GPU, with the CPU in its place: whatever says no device is nowhere."""
    answers = predictor(mask_id=None if sampler.drafts else MASK)

    def predict(query: Query) -> Prediction:
        assert {query.row.device.type, query.position.device.type} == {"cpu"}
        with torch.device("cpu"):
            return answers(query)

    together = rows(sampler, cache)
    steps = run(together, predict, batch=Batch("cpu"))
    next(steps)  # rows are admitted, from where they were made
    with torch.device("meta"):
        for turn in steps:
            assert all(event.error is None for _, event in turn), turn
    assert all(row.finished for row in together)
