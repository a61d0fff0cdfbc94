"""What a generation can cost is known before its first forward, and never less than what it comes to."""

from collections.abc import Sequence
from typing import Any

import pytest

from samplers import (
    AttentionPattern,
    Canvas,
    Layout,
    Modifier,
    Sampler,
    SamplerError,
    SamplerParams,
    View,
    get_sampler,
    list_samplers,
)
from samplers.loop.row import Row
from samplers.loop.run import finish
from samplers.loop.work import work
from samplers.resources import bound
from tests.samplers.models import MASK, VOCAB, predictor, random_logits

PARAMS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {}),
    ("topk", {"k": 3}),
    ("topk", {"steps": 7}),
    ("random", {"steps": 12}),
    ("sequential", {"k": 2}),
    ("threshold", {"threshold": 1.0, "steps": 8}),
    ("threshold", {"threshold": 0.05}),
    ("margin", {"threshold": 0.9}),
    ("entropy", {"k": 4}),
    ("dream", {"steps": 9}),
    ("dream", {"alg": "origin", "steps": 30}),
    ("factor", {}),
    ("hierarchy", {}),
    ("hierarchy_remask", {"remask_below": 0.9}),
    ("credit", {}),
    ("entropy_bound", {}),
    ("edit", {"edit_threshold": 0.0, "max_post_steps": 3}),
    ("local_leap", {}),
    ("saber", {"n": 1}),
    ("smc", {"particles": 3}),
    ("smc", {"particles": 2, "base": "topk", "base_params": {"steps": 7}}),
    ("diffusion_gemma", {"max_denoising_steps": 5}),
]
SCHEMES = [
    AttentionPattern(),
    AttentionPattern(causal_block=8),
    AttentionPattern(shifted=True),
    AttentionPattern(causal_block=4, shifted=True),
    AttentionPattern(noise=VOCAB),
]


def test_every_sampler_is_here() -> None:
    ours = {sampler.name for sampler in list_samplers() if type(sampler).__module__.startswith("samplers.")}
    assert {name for name, _ in PARAMS} == ours - {"policy"}


@pytest.mark.parametrize("block_length", [None, 4, 8])
@pytest.mark.parametrize(("name", "given"), PARAMS, ids=str)
def test_no_generation_takes_more_forwards_than_it_may(
    name: str, given: dict[str, Any], block_length: int | None
) -> None:
    params = get_sampler(name).Params(**given)
    sampler = bound(get_sampler(name), params)
    tried = 0
    for pattern in SCHEMES:
        if sampler.incompatibility(pattern) or (
            pattern.causal_block and block_length and pattern.causal_block % block_length
        ):
            continue
        for length in (1, 13, 24):
            canvas = Canvas.blank([2, 3, 4], length, None if pattern.noise else MASK, block_length, pattern=pattern)
            try:
                row = Row(canvas, sampler, params)
            except ValueError:
                continue  # fewer steps than blocks
            most = sampler.most_forwards(params, canvas.layout) * sampler.slots(params)
            assert work(row) == most * canvas.layout.length
            finish([row], predictor(random_logits, None if pattern.noise else MASK))
            assert 1 <= row.forwards <= most
            tried += 1
    assert tried


@pytest.mark.parametrize(
    ("name", "given", "most"),
    [
        ("topk", {}, 40),
        ("topk", {"k": 4}, 10),
        ("topk", {"k": 100}, 5),
        ("topk", {"steps": 16}, 16),
        ("factor", {}, 40),
    ],
)
def test_a_schedule_is_known(name: str, given: dict[str, Any], most: int) -> None:
    sampler = get_sampler(name)
    row = Row(Canvas.blank([1] * 8, 40, MASK, 8), sampler, sampler.Params(**given))
    assert sampler.most_forwards(row.params, row.canvas.layout) == most
    assert work(row) == most * 48


class Answers(Sampler):
    """Says anything of its work."""

    name = "answers"

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def select(self, step: Any) -> Any:
        raise NotImplementedError

    def slots(self, params: SamplerParams) -> int:
        return self._answers.get("slots", 1)

    def most_forwards(self, params: SamplerParams, layout: Layout) -> int:
        return self._answers.get("forwards", 3)


class Views(Modifier):
    """Shows the model these."""

    name = "views"

    def __init__(self, *views: View) -> None:
        self._views = views

    def views(self, params: SamplerParams, views: Sequence[View]) -> Sequence[View]:
        return self._views


def row_of(prompt: list[int], sampler: Sampler, *views: View) -> Row:
    around = [(Views(*views), SamplerParams())] if views else []
    return Row(Canvas.blank(prompt, 10, MASK), sampler, SamplerParams(), modifiers=around)


def test_slots_and_views_count() -> None:
    assert work(row_of([], Answers(slots=4), View(), View(-1.0, "masked"))) == 4 * 2 * 3 * 10


def test_a_view_with_a_longer_prompt_costs_more() -> None:
    assert work(row_of([1, 2], Answers(), View(), View(-1.0, (1, 2, 3, 4, 5)))) == 3 * (12 + 15)


@pytest.mark.parametrize("answer", [0, -1, 1.5, None, float("nan"), "3"])
@pytest.mark.parametrize("what", ["slots", "forwards"])
def test_what_is_no_number_is_refused(what: str, answer: Any) -> None:
    with pytest.raises(SamplerError, match="must be an integer from 1"):
        work(row_of([], Answers(**{what: answer})))
