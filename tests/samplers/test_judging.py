"""The distribution that a drawn token's confidence is of: in some families the one that it is drawn from."""

from dataclasses import replace

import pytest
import torch

from samplers import BIDIRECTIONAL, AttentionPattern, Canvas, TokenChoice, get_sampler
from samplers.loop.row import Row
from tests.samplers.models import MASK, predictor, random_logits, turn

OWN = AttentionPattern(causal_block=8)


def row(pattern: AttentionPattern, choice: TokenChoice, threshold: float = 0.9) -> Row:
    sampler = get_sampler("threshold")
    canvas = Canvas.blank([], 8, MASK, pattern=pattern)
    return Row(canvas, sampler, sampler.Params(threshold=threshold), choice, seed=3)


@pytest.mark.parametrize("pattern", [OWN, BIDIRECTIONAL])
def test_one_choice_left_is_certain_where_the_family_judges_what_is_drawn(pattern: AttentionPattern) -> None:
    """With top_k 1 every token has probability 1 after the filters, which is above any threshold."""
    choice = TokenChoice(1.0, top_k=1)
    plain, judged = row(pattern, choice), row(replace(pattern, judges_drawn=True), choice)
    batch = [plain, judged, row(replace(pattern, judges_drawn=True), TokenChoice())]
    outcomes = turn(batch, predictor())
    assert [len(outcome.positions) for outcome in outcomes] == [1, 8, 1]


def test_what_is_told_is_the_models_own_probability() -> None:
    judged = row(replace(OWN, judges_drawn=True), TokenChoice(1.0, top_k=1))
    own = random_logits(judged.canvas)
    own[:, MASK] = -torch.inf
    expected = random_logits(judged.canvas).softmax(dim=-1).gather(1, own.argmax(dim=-1, keepdim=True))[:, 0]
    (outcome,) = turn([judged], predictor())
    torch.testing.assert_close(torch.tensor(outcome.confidences), expected)


def test_at_a_threshold_of_one_block_causal_families_commit_one_a_forward() -> None:
    """Their programs ask for more than the threshold, Fast-dLLM's for as much: at top_k 1 all have exactly 1."""
    strict = replace(OWN, judges_drawn=True, strict=True)
    for pattern, count in ((strict, 1), (replace(strict, strict=False), 8)):
        (outcome,) = turn([row(pattern, TokenChoice(1.0, top_k=1), threshold=1.0)], predictor())
        assert len(outcome.positions) == count
