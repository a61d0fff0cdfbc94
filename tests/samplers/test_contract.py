"""What holds for every registered sampler, whatever its rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    Canvas,
    Modifier,
    Sampler,
    SamplerParams,
    Selection,
    Step,
    TokenChoice,
    list_modifiers,
    list_samplers,
)
from samplers.forward.query import Predict
from samplers.loop.event import StepEvent
from samplers.loop.guard import incompatibility
from samplers.loop.row import Row
from samplers.loop.run import finish, run
from samplers.resources import bound
from tests.policies import tiny
from tests.samplers import models
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
    "local_leap": st.fixed_dictionaries(
        {},
        optional={
            "threshold": st.floats(0.01, 1.0),
            "relaxed_threshold": st.floats(0.01, 1.0),
            "radius": st.integers(0, 6),
        },
    ),
    "saber": st.fixed_dictionaries({}, optional={"n": st.integers(1, 6)}),
    "smc": st.fixed_dictionaries(
        {"particles": st.integers(1, 3)},
        optional={"ess": st.floats(0, 1), "base_params": st.fixed_dictionaries({"threshold": st.floats(0.01, 1.0)})},
    ),
    "policy": st.one_of(
        st.fixed_dictionaries(
            {}, optional={"temperature": st.floats(0, 3), "floor": st.floats(0, 1), "policy": st.just("p")}
        ),
        st.fixed_dictionaries({"floor": st.floats(0, 1)}),
    ),
}
"""How to draw the parameters of each sampler. A new sampler is not tested before it stands here."""

MODIFIER_PARAMETERS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "guidance": st.fixed_dictionaries(
        {"scale": st.sampled_from([0.0, 0.5, 2.0])},
        optional={"negative_prompt": st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)},
    ),
    "credit": st.fixed_dictionaries(
        {}, optional={"alpha": st.floats(0, 3.0), "gamma": st.floats(0, 2.0), "beta": st.floats(0, 1.0)}
    ),
    "spacing": st.fixed_dictionaries({}, optional={"min_gap_start": st.integers(1, 12), "min_gap": st.integers(1, 5)}),
}
"""The same for modifiers."""

RULES = [bound(sampler, sampler.Params()) for sampler in list_samplers() if sampler.name != "policy"]
POLICIES = {
    "bernoulli": tiny.sampler(region=False),
    "region": tiny.sampler(**tiny.RICH, region=True),
    "speed": tiny.sampler(region=False, takes_speed=True),
    "dpls": tiny.sampler(region=False, action="dpls"),
}
each_sampler = pytest.mark.parametrize(
    "sampler", [*RULES, *POLICIES.values()], ids=[s.name for s in RULES] + [*POLICIES]
)
MODIFIED = [
    (modifier, sampler)
    for modifier in list_modifiers()
    for sampler in [*RULES, POLICIES["bernoulli"]]
    if incompatibility(sampler, AttentionPattern(noise=VOCAB) if sampler.drafts else BIDIRECTIONAL, [modifier]) is None
]
each_modified = pytest.mark.parametrize(
    ("modifier", "sampler"), MODIFIED, ids=[f"{modifier.name}-{sampler.name}" for modifier, sampler in MODIFIED]
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
    modifiers: Sequence[tuple[Modifier, SamplerParams]] = ()

    def row(self, sampler: Sampler) -> Row:
        canvas = blank(sampler, self.prompt, self.gen_length, self.block_length, self.suffix)
        given = torch.zeros_like(canvas.masked)
        given[: self.gen_length] = torch.tensor(self.given[: self.gen_length])
        canvas.masked[given] = False
        canvas.generated[given] = 5
        return Row(
            canvas,
            sampler,
            self.params,
            self.choice,
            self.seed,
            self.end_ids,
            self.fill_after_end,
            vocabulary=VOCAB,
            modifiers=self.modifiers,
        )


def blank(
    sampler: Sampler, prompt: list[int], gen_length: int, block_length: int | None = None, suffix: Sequence[int] = ()
) -> Canvas:
    """A canvas of a model that this sampler is for."""
    pattern = AttentionPattern(noise=VOCAB) if sampler.drafts else BIDIRECTIONAL
    return Canvas.blank(prompt, gen_length, None if sampler.drafts else MASK, block_length, list(suffix), pattern)


def predict_for(sampler: Sampler, logits: Logits = random_logits) -> Predict:
    return predictor(logits, None if sampler.drafts else MASK)


def starts(sampler: Sampler, modifier: Modifier | None = None) -> st.SearchStrategy[Start]:
    tokens = st.integers(0, VOCAB - 1)
    around: st.SearchStrategy[Any] = st.just(())
    if modifier is not None:
        around = MODIFIER_PARAMETERS[modifier.name].map(lambda values: ((modifier, modifier.Params(**values)),))
    greedy = sampler.chooses_tokens or (modifier is not None and modifier.chooses_tokens)
    return st.builds(
        Start,
        prompt=st.lists(tokens, max_size=5),
        gen_length=st.integers(1, 16),
        block_length=st.integers(4 if sampler.drafts else 1, 20),
        suffix=st.lists(tokens, max_size=3),
        # The first position is masked in each, so that there is something to do.
        given=st.lists(st.booleans(), min_size=15, max_size=15).map(lambda rest: [False, *rest]),
        params=PARAMETERS[sampler.name].map(lambda values: sampler.Params(**values)),
        choice=st.sampled_from(CHOICES[:1] if greedy else CHOICES),
        seed=st.integers(0, 2**63 - 1),
        end_ids=st.sampled_from([frozenset[int](), frozenset({7}), frozenset({3, 7})]),
        fill_after_end=st.booleans(),
        modifiers=around,
    )


def budget_of(row: Row) -> int:
    """Most forwards that a generation may take."""
    sampler, layout = row.sampler, row.canvas.layout
    most = int(row.canvas.masked.sum())
    if sampler.revises:
        most = sum(2 * layout.block_size(b) + sampler.post_steps(row.params) for b in range(layout.blocks))
    if sampler.drafts:
        most = layout.blocks * sampler.draft_steps(row.params)
    return most * row.passes


def may_change(row: Row) -> set[int]:
    """Positions that the next step may commit or change."""
    if not row.sampler.revises:
        return set(row.candidates().tolist())
    return set(range(*row.asked_bounds())) - set(row.given.nonzero()[:, 0].tolist())


def check_steps(sampler: Sampler, begin: Sequence[Start]) -> None:
    """Only candidates change, at least one each step, never to a mask, and it ends within its budget.

    One that revises may also change what is committed in its block, but nothing that was given. One that drafts has a
    budget of steps, and may leave its candidates open until then. Of several canvases nothing is told until the end.
    """
    rows = [start.row(sampler) for start in begin]
    budget = [budget_of(row) for row in rows]
    before: dict[int, tuple[Tensor, set[int]]] = {}

    def running() -> list[Row]:
        left = [row for row in rows if not row.finished]
        before.update({id(row): (row.canvas.tokens.clone(), may_change(row)) for row in left})
        return left

    for turn in run(running, predict_for(sampler)):
        for row, event in turn:
            assert event.error is None
            if row.particles is None:
                check_event(row, event, *before[id(row)])
    assert all(row.forwards <= most for row, most in zip(rows, budget, strict=True))


def check_event(row: Row, event: StepEvent, old: Tensor, allowed: set[int]) -> None:
    sampler = row.sampler
    assert event.positions or sampler.revises or sampler.drafts
    assert set(event.positions) <= allowed
    assert MASK not in event.tokens or sampler.drafts
    assert len(event.positions) == len(event.tokens) == len(event.confidences)
    start = row.canvas.layout.prompt_length
    changed = {int(p) - start for p in (row.canvas.tokens != old).nonzero()[:, 0]}
    may = set(event.positions) | set(event.filled) | set(event.remasked)
    if sampler.drafts:  # a new block begins with other noise than was there
        may |= allowed | set(row.candidates().tolist())
    assert changed <= may
    assert set(event.replaced) <= set(event.positions)
    assert not row.canvas.masked[event.positions + event.filled].any()


def check_alone(sampler: Sampler, begin: Sequence[Start]) -> None:
    """Same seed, same result, whoever shares the batch."""
    together = [start.row(sampler) for start in begin]
    finish(together, predict_for(sampler))
    for start, row in zip(begin, together, strict=True):
        alone = start.row(sampler)
        finish([alone], predict_for(sampler))
        assert alone.canvas.tokens.equal(row.canvas.tokens)
        assert (alone.forwards, alone.end, alone.told) == (row.forwards, row.end, row.told)


@each_sampler
@settings(max_examples=15)
@given(data=st.data())
def test_each_step_keeps_the_contract(sampler: Sampler, data: st.DataObject) -> None:
    check_steps(sampler, data.draw(st.lists(starts(sampler), min_size=1, max_size=4)))


@each_modified
@settings(max_examples=3)
@given(data=st.data())
def test_each_step_with_a_modifier_keeps_the_contract(
    modifier: Modifier, sampler: Sampler, data: st.DataObject
) -> None:
    check_steps(sampler, data.draw(st.lists(starts(sampler, modifier), min_size=1, max_size=4)))


@each_sampler
@settings(max_examples=4)  # of eight generations each
@given(data=st.data())
def test_the_same_alone_and_in_a_batch_of_eight(sampler: Sampler, data: st.DataObject) -> None:
    check_alone(sampler, data.draw(st.lists(starts(sampler), min_size=8, max_size=8)))


@each_modified
@settings(max_examples=2)
@given(data=st.data())
def test_the_same_alone_and_in_a_batch_of_eight_with_a_modifier(
    modifier: Modifier, sampler: Sampler, data: st.DataObject
) -> None:
    check_alone(sampler, data.draw(st.lists(starts(sampler, modifier), min_size=8, max_size=8)))


@each_sampler
@settings(max_examples=12)
@given(data=st.data())
def test_select_changes_nothing_and_repeats_itself(sampler: Sampler, data: st.DataObject) -> None:
    rows = [start.row(sampler) for start in data.draw(st.lists(starts(sampler), min_size=1, max_size=4))]
    select, asked = sampler.select, []

    def twice(step: Step) -> Selection:
        def tensors() -> list[Tensor]:
            each = [*(v for v in vars(step).values() if isinstance(v, Tensor)), *step.extra.values()]
            return [*each, *step.state.values(), *vars(step.layout).values(), step.columns.values]

        before = [tensor.clone() for tensor in tensors()]
        first = select(step)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, tensors(), strict=True))
        assert select(step).commit.equal(first.commit)
        asked.append(len(step.params))
        return first

    with pytest.MonkeyPatch.context() as patching:
        patching.setattr(sampler, "select", twice)
        events = models.turn(rows, predict_for(sampler))
    assert asked and all(event.error is None for event in events)


@each_sampler
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_of_broken_logits_is_refused_and_harms_no_other(sampler: Sampler, poison: float) -> None:
    def row(number: int) -> Row:
        choice = TokenChoice(0.0 if sampler.chooses_tokens else 0.5)
        return Row(blank(sampler, [number + 1], 8), sampler, sampler.Params(), choice, seed=number)

    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        if canvas.tokens[0] == 4:
            out[3, 5] = poison
        return out

    clean, rows = [row(i) for i in range(8)], [row(i) for i in range(8)]
    finish(clean, predict_for(sampler))
    failed = [each for turn in run(rows, predict_for(sampler, logits)) for each, event in turn if event.error]
    assert len(failed) == 1 and failed[0] is rows[3]
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


@pytest.mark.parametrize("modifier", list_modifiers(), ids=lambda modifier: modifier.name)
def test_a_modifier_describes_itself(modifier: Modifier) -> None:
    assert modifier.name in MODIFIER_PARAMETERS and modifier.name in {each.name for each, _ in MODIFIED}
    assert modifier.summary().endswith(".")
    assert modifier.paper.startswith("https://")
    properties = modifier.schema().get("properties", {})
    assert properties and all("description" in entry for entry in properties.values())
    assert modifier.schema()["additionalProperties"] is False
