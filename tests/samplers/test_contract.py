"""What holds for every registered sampler, whatever its rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import BIDIRECTIONAL, AttentionPattern, Canvas, Sampler, SamplerParams, TokenChoice, list_samplers
from samplers.forward.query import Predict
from samplers.loop.denoising import advance, ask, denoise
from samplers.loop.grid import Grid
from samplers.loop.row import Row
from tests.policies import tiny
from tests.samplers.models import MASK, VOCAB, Logits, predictor, random_logits

counts = st.integers(1, 20)
scheduled = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"k": counts}),
    st.fixed_dictionaries({"steps": st.integers(16, 40)}),  # at least one for each block there may be
)
PARAMETERS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "random": scheduled,
    "topk": scheduled,
    "sequential": scheduled,
    "threshold": st.tuples(scheduled, st.fixed_dictionaries({}, optional={"threshold": st.floats(0.01, 1.0)})).map(
        lambda both: both[0] | both[1]
    ),
    "entropy": st.one_of(scheduled, st.fixed_dictionaries({"threshold": st.floats(0, 5.0)})),
    "credit": st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.floats(0.01, 1.0),
            "alpha": st.floats(0, 3.0),
            "gamma": st.floats(0, 2.0),
            "beta": st.floats(0, 1.0),
        },
    ),
    "edit": st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.floats(0, 0.99),
            "k": st.integers(1, 4),
            "edit_threshold": st.one_of(st.none(), st.floats(0, 1.0)),
            "max_post_steps": st.integers(0, 5),
            "penalty": st.floats(0, 3.0),
        },
    ),
    "diffusion_gemma": st.fixed_dictionaries(
        {},
        optional={
            "entropy_bound": st.floats(0, 20),
            "t_min": st.floats(0, 0.5),
            "t_max": st.floats(0.5, 2.0),
            "max_denoising_steps": st.integers(1, 4),
            "stability_threshold": st.integers(0, 2),
            "confidence_threshold": st.floats(0, 3),
        },
    ),
    "dream": st.fixed_dictionaries(
        {},
        optional={
            "alg": st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]),
            "steps": st.integers(16, 40),
            "alg_temp": st.floats(0, 2.0),
            "eps": st.floats(1e-4, 0.5),
        },
    ),
    "hierarchy": st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.one_of(st.none(), st.floats(0.01, 1.0)),
            "low_threshold": st.one_of(st.none(), st.floats(0, 1.0)),
        },
    ),
    "hierarchy_remask": st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.one_of(st.none(), st.floats(0.01, 1.0)),
            "remask_below": st.floats(0, 1.0),
            "low_threshold": st.one_of(st.none(), st.floats(0, 1.0)),
        },
    ),
    "factor": st.fixed_dictionaries({}, optional={"factor": st.floats(0.01, 5.0)}),
    "margin": st.one_of(scheduled, st.fixed_dictionaries({"threshold": st.floats(0.01, 1.0)})),
    "entropy_bound": st.fixed_dictionaries(
        {},
        optional={
            "gamma": st.floats(0, 10),
            "proxy": st.sampled_from(["entropy", "confidence", "margin"]),
            "own": st.booleans(),
        },
    ),
    "policy": st.one_of(
        st.fixed_dictionaries(
            {}, optional={"temperature": st.floats(0, 3), "floor": st.floats(0, 1), "policy": st.just("p")}
        ),
        st.fixed_dictionaries({"floor": st.floats(0, 1)}),
    ),
}
"""How to draw the parameters of each sampler. A new sampler is not tested before it stands here."""

RULES = [sampler for sampler in list_samplers() if sampler.name != "policy"]
POLICIES = {
    "bernoulli": tiny.sampler(region=False),
    "region": tiny.sampler(**tiny.RICH, region=True),
    "speed": tiny.sampler(region=False, takes_speed=True),
    "dpls": tiny.sampler(region=False, action="dpls"),
}
each_sampler = pytest.mark.parametrize(
    "sampler", [*RULES, *POLICIES.values()], ids=[s.name for s in RULES] + [*POLICIES]
)


CHOICES = [TokenChoice(), TokenChoice(0.7), TokenChoice(1.3, top_p=0.8, top_k=4)]


@dataclass(frozen=True)
class Start:
    """All that a generation begins with."""

    prompt: list[int]
    gen_length: int
    block_length: int
    suffix: list[int]
    given: list[bool]
    params: SamplerParams
    choice: TokenChoice
    seed: int
    end_ids: frozenset[int]
    fill_after_end: bool

    def row(self, sampler: Sampler) -> Row:
        canvas = blank(sampler, self.prompt, self.gen_length, self.block_length, self.suffix)
        given = torch.zeros_like(canvas.masked)
        given[: self.gen_length] = torch.tensor(self.given[: self.gen_length])
        canvas.masked[given] = False
        canvas.generated[given] = 5
        return Row(canvas, sampler, self.params, self.choice, self.seed, self.end_ids, self.fill_after_end)


def blank(
    sampler: Sampler, prompt: list[int], gen_length: int, block_length: int | None = None, suffix: Sequence[int] = ()
) -> Canvas:
    """A canvas of a model that this sampler is for."""
    pattern = AttentionPattern(noise=VOCAB) if sampler.drafts else BIDIRECTIONAL
    return Canvas.blank(prompt, gen_length, None if sampler.drafts else MASK, block_length, list(suffix), pattern)


def predict_for(sampler: Sampler, logits: Logits = random_logits) -> Predict:
    return predictor(logits, None if sampler.drafts else MASK)


def starts(sampler: Sampler) -> st.SearchStrategy[Start]:
    tokens = st.integers(0, VOCAB - 1)
    return st.builds(
        Start,
        prompt=st.lists(tokens, max_size=5),
        gen_length=st.integers(1, 16),
        block_length=st.integers(1, 20),
        suffix=st.lists(tokens, max_size=3),
        # The first position is masked in each, so that there is something to do.
        given=st.lists(st.booleans(), min_size=15, max_size=15).map(lambda rest: [False, *rest]),
        params=PARAMETERS[sampler.name].map(lambda values: sampler.Params(**values)),
        choice=st.sampled_from(CHOICES[:1] if sampler.greedy else CHOICES),
        seed=st.integers(0, 2**63 - 1),
        end_ids=st.sampled_from([frozenset[int](), frozenset({7}), frozenset({3, 7})]),
        fill_after_end=st.booleans(),
    )


@each_sampler
@settings(max_examples=25)
@given(data=st.data())
def test_each_step_keeps_the_contract(sampler: Sampler, data: st.DataObject) -> None:
    """Only candidates change, at least one each step, never to a mask, and it ends within its budget.

    One that revises may also change what is committed in its block, but nothing that was given. One that drafts has a
    budget of steps, and may leave its candidates open until then.
    """
    rows = [start.row(sampler) for start in data.draw(st.lists(starts(sampler), min_size=1, max_size=4))]
    predict = predict_for(sampler)
    budget = [int(row.canvas.masked.sum()) for row in rows]
    if sampler.revises:
        budget = [
            sum(2 * row.canvas.layout.block_size(b) + sampler.post_steps(row.params) for b in range(layout.blocks))
            for row in rows
            for layout in [row.canvas.layout]
        ]
    if sampler.drafts:
        budget = [row.canvas.layout.blocks * sampler.draft_steps(row.params) for row in rows]
    while running := [row for row in rows if not row.finished]:
        before = [row.canvas.tokens.clone() for row in running]
        candidates = [set(row.candidates().tolist()) for row in running]
        if sampler.revises:
            fixed = [set(row.given.nonzero()[:, 0].tolist()) for row in running]
            candidates = [set(row.asked(row.span()).tolist()) - g for row, g in zip(running, fixed, strict=True)]
        query = ask(running)
        for row, old, allowed, outcome in zip(
            running, before, candidates, advance(running, query, predict(query)), strict=True
        ):
            assert outcome.error is None
            assert outcome.positions or sampler.revises or sampler.drafts
            assert set(outcome.positions) <= allowed
            assert MASK not in outcome.tokens or sampler.drafts
            assert len(outcome.positions) == len(outcome.tokens) == len(outcome.confidences)
            start = row.canvas.layout.prompt_length
            changed = {int(p) - start for p in (row.canvas.tokens != old).nonzero()[:, 0]}
            may = set(outcome.positions) | set(outcome.filled) | set(outcome.remasked)
            if sampler.drafts:  # a new block begins with other noise than was there
                may |= allowed | set(row.candidates().tolist())
            assert changed <= may
            assert set(outcome.replaced) <= set(outcome.positions)
            assert not row.canvas.masked[outcome.positions + outcome.filled].any()
    assert all(row.forwards <= most for row, most in zip(rows, budget, strict=True))


@each_sampler
@settings(max_examples=6)  # of eight generations each
@given(data=st.data())
def test_the_same_alone_and_in_a_batch_of_eight(sampler: Sampler, data: st.DataObject) -> None:
    """Same seed, same result, whoever shares the batch."""
    begin = data.draw(st.lists(starts(sampler), min_size=8, max_size=8))
    together = [start.row(sampler) for start in begin]
    denoise(together, predict_for(sampler))
    for start, row in zip(begin, together, strict=True):
        alone = start.row(sampler)
        denoise([alone], predict_for(sampler))
        assert alone.canvas.tokens.equal(row.canvas.tokens)
        assert (alone.forwards, alone.end) == (row.forwards, row.end)


@each_sampler
@settings(max_examples=20)
@given(data=st.data())
def test_select_changes_nothing_and_repeats_itself(sampler: Sampler, data: st.DataObject) -> None:
    rows = [start.row(sampler) for start in data.draw(st.lists(starts(sampler), min_size=1, max_size=4))]
    query = ask(rows)
    step = Grid(rows, query.row, query.position, predict_for(sampler)(query)).step(range(len(rows)))

    def tensors() -> list[Tensor]:
        return [*(v for v in vars(step).values() if isinstance(v, Tensor)), *step.extra.values()]

    before = [tensor.clone() for tensor in tensors()]
    first = sampler.select(step).commit
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, tensors(), strict=True))
    assert sampler.select(step).commit.equal(first)


@each_sampler
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_of_broken_logits_is_refused_and_harms_no_other(sampler: Sampler, poison: float) -> None:
    def row(number: int) -> Row:
        choice = TokenChoice(0.0 if sampler.greedy else 0.5)
        return Row(blank(sampler, [number + 1], 8), sampler, sampler.Params(), choice, seed=number)

    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        if canvas.tokens[0] == 4:
            out[3, 5] = poison
        return out

    clean, rows = [row(i) for i in range(8)], [row(i) for i in range(8)]
    denoise(clean, predict_for(sampler))
    running = list(rows)
    while running:
        query = ask(running)
        outcomes = advance(running, query, predict_for(sampler, logits)(query))
        assert all(row is rows[3] for row, outcome in zip(running, outcomes, strict=True) if outcome.error is not None)
        running = [
            row for row, outcome in zip(running, outcomes, strict=True) if outcome.error is None and not row.finished
        ]
    assert rows[3].forwards == 0 and rows[3].canvas.masked.all(), "a refused row is left as it was"
    for i in set(range(8)) - {3}:
        assert rows[i].canvas.tokens.equal(clean[i].canvas.tokens)


@each_sampler
def test_it_describes_itself(sampler: Sampler) -> None:
    assert sampler.name in PARAMETERS
    assert sampler.summary().endswith(".")
    assert sampler.paper.startswith("https://")
    properties = sampler.schema().get("properties", {})
    assert all("description" in entry and "default" in entry for entry in properties.values())
    assert sampler.schema()["additionalProperties"] is False
