"""The one loop: against a plain one, and what end-of-text, blocks, suffixes and failures do to it."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import (
    Canvas,
    Sampler,
    SamplerError,
    SamplerParams,
    Selection,
    Step,
    TokenChoice,
    get_modifier,
    get_sampler,
)
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.summary import summarise
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query
from tests.samplers.models import MASK, VOCAB, events_of, predictor, random_logits, scripted, turn


def plain_loop(prompt: list[int], gen: int, block: int, rule: str, number: float) -> tuple[list[int], int]:
    """Row as a paper would write it down: tokens and forwards."""
    tokens, masked, forwards = [*prompt, *[MASK] * gen], set(range(gen)), 0
    for start in range(0, gen, block):
        while here := sorted(masked & set(range(start, start + block))):
            canvas = Canvas.blank(prompt, gen, MASK)
            canvas.tokens[:] = torch.tensor(tokens)
            seen = summarise(random_logits(canvas)[len(prompt) :], MASK)
            order = sorted(here, key=lambda p: (-seen.confidence[p].item(), p))
            sure = [p for p in order if seen.confidence[p].item() >= number]
            for p in (sure or order[:1]) if rule == "threshold" else order[: int(number)]:
                tokens[len(prompt) + p] = int(seen.token[p])
                masked.remove(p)
            forwards += 1
    return tokens, forwards


@settings(max_examples=30)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    gen=st.integers(1, 20),
    block=st.integers(1, 24),
    rule=st.one_of(
        st.tuples(st.just("topk"), st.integers(1, 6).map(float)),
        st.tuples(st.just("threshold"), st.sampled_from([0.125, 0.25, 0.5, 0.75, 0.9375])),  # exact in float32 too
    ),
)
def test_the_loop_does_what_a_plain_loop_does(prompt: list[int], gen: int, block: int, rule: tuple[str, float]) -> None:
    name, number = rule
    sampler = get_sampler(name)
    params = sampler.Params(threshold=number) if name == "threshold" else sampler.Params(k=int(number))
    row = Row(Canvas.blank(prompt, gen, MASK, block), sampler, params)
    finish([row], predictor())
    assert (row.canvas.tokens.tolist(), row.forwards) == plain_loop(prompt, gen, block, name, number)
    assert row.finished and row.completion_tokens == gen and not row.canvas.masked.any()


END, OTHER_END = 9, 10


def start(
    script: dict[int, tuple[int, float]], gen: int = 6, block: int | None = None, sampler: str = "topk", **options: Any
) -> Row:
    """A generation from a one-token prompt whose tokens and confidences are scripted."""
    rule = get_sampler(sampler)
    params = rule.Params(**options.pop("params", {}))
    options = {"end_ids": frozenset({END, OTHER_END})} | options
    return Row(Canvas.blank([1], gen, MASK, block), rule, params, **options)


def steps(row: Row, script: dict[int, tuple[int, float]]) -> list[tuple[list[int], list[int]]]:
    """Run to the end: what each forward committed and what it filled."""
    (events,) = events_of([row], predictor(scripted(script, offset=1)))
    assert all(event.error is None for event in events)
    return [(event.positions, event.filled) for event in events]


FALLING = {0: (2, 0.9), 1: (3, 0.8), 2: (END, 0.7), 3: (4, 0.6), 4: (5, 0.5), 5: (6, 0.4)}
END_FIRST = {0: (2, 0.5), 1: (3, 0.6), 2: (END, 0.9), 3: (4, 0.8), 4: (5, 0.7), 5: (6, 0.4)}


def test_an_end_of_text_settles_all_after_it() -> None:
    row = start(FALLING)
    assert steps(row, FALLING) == [([0], []), ([1], []), ([2], [3, 4, 5])]
    assert row.canvas.generated.tolist() == [2, 3, END, END, END, END]
    assert (row.end, row.completion_tokens, row.text_tokens(), row.forwards) == (2, 3, [2, 3], 3)


def test_without_filling_it_ends_as_soon_as_all_before_the_end_is_settled() -> None:
    row = start(FALLING, fill_after_end=False)
    assert steps(row, FALLING) == [([0], []), ([1], []), ([2], [])]
    assert row.canvas.masked.tolist() == [False] * 3 + [True] * 3
    assert (row.end, row.completion_tokens, row.text_tokens()) == (2, 3, [2, 3])


def test_an_end_committed_before_earlier_positions_waits_for_them() -> None:
    row = start(END_FIRST)
    assert steps(row, END_FIRST) == [([2], [3, 4, 5]), ([1], []), ([0], [])]
    assert (row.completion_tokens, row.text_tokens(), row.forwards) == (3, [2, 3], 3)
    assert row.canvas.generated.tolist() == [2, 3, END, END, END, END]


def test_without_filling_positions_after_the_end_go_on_being_denoised() -> None:
    row = start(END_FIRST, fill_after_end=False)
    assert [positions for positions, _ in steps(row, END_FIRST)] == [[2], [3], [4], [1], [0]]
    assert (row.completion_tokens, row.text_tokens(), row.end) == (3, [2, 3], 2)


def test_a_later_end_gives_way_to_an_earlier_one() -> None:
    script = {0: (2, 0.5), 1: (OTHER_END, 0.6), 2: (3, 0.55), 3: (END, 0.9), 4: (5, 0.7), 5: (6, 0.4)}
    row = start(script)
    assert steps(row, script) == [([3], [4, 5]), ([1], [2]), ([0], [])]
    assert row.canvas.generated.tolist() == [2, OTHER_END, OTHER_END, END, END, END]
    assert (row.end, row.completion_tokens, row.text_tokens()) == (1, 2, [2])


def test_several_ends_in_one_step_count_from_the_first() -> None:
    script = {0: (2, 0.9), 1: (OTHER_END, 0.9), 2: (3, 0.9), 3: (END, 0.9), 4: (5, 0.1), 5: (6, 0.1)}
    row = start(script, sampler="threshold", params={"threshold": 0.8})
    assert steps(row, script) == [([0, 1, 2, 3], [4, 5])]
    assert (row.end, row.text_tokens(), row.completion_tokens) == (1, [2], 2)


def test_an_end_in_a_block_settles_the_later_blocks() -> None:
    row = start(END_FIRST, block=3)
    assert steps(row, END_FIRST) == [([2], [3, 4, 5]), ([1], []), ([0], [])]
    assert row.finished


def test_an_end_in_the_first_place_leaves_no_text() -> None:
    script = {0: (END, 0.9), 1: (3, 0.8)}
    row = start(script, gen=2)
    assert steps(row, script) == [([0], [1])]
    assert (row.text_tokens(), row.completion_tokens) == ([], 1)


def test_without_end_tokens_the_whole_region_is_denoised() -> None:
    row = start(FALLING, end_ids=frozenset())
    assert len(steps(row, FALLING)) == 6
    assert (row.end, row.completion_tokens, row.text_tokens()) == (None, 6, [2, 3, END, 4, 5, 6])


def test_an_end_in_the_prompt_is_just_a_token() -> None:
    sampler = get_sampler("topk")
    row = Row(Canvas.blank([END, 1], 3, MASK), sampler, sampler.Params(), end_ids=frozenset({END}))
    assert not row.finished and row.end is None


def test_blocks_go_left_to_right() -> None:
    rising = {p: (2, 0.1 + 0.1 * p) for p in range(6)}
    assert [p for p, _ in steps(start(rising, block=4), rising)] == [[3], [2], [1], [0], [5], [4]]


def test_mask_tokens_in_the_prompt_and_suffix_are_just_tokens() -> None:
    sampler = get_sampler("threshold")
    canvas = Canvas.blank([MASK, 1, MASK], 4, MASK, suffix=[MASK, 3])
    row = Row(canvas, sampler, sampler.Params(threshold=0.01))
    assert next_query([row]).position.tolist() == [3, 4, 5, 6]
    finish([row], predictor())
    assert canvas.tokens[:3].tolist() == [MASK, 1, MASK] and canvas.tokens[-2:].tolist() == [MASK, 3]
    assert MASK not in canvas.generated.tolist()


def test_infilling_sees_the_suffix_and_keeps_it() -> None:
    sampler = get_sampler("topk")
    outcomes = []
    for suffix in ([3, 4], [5, 6]):
        row = Row(Canvas.blank([1, 2], 8, MASK, suffix=suffix), sampler, sampler.Params())
        finish([row], predictor())
        assert row.canvas.tokens[-2:].tolist() == suffix
        outcomes.append(row.canvas.generated.tolist())
    assert outcomes[0] != outcomes[1]


def test_given_positions_are_kept_and_their_block_is_skipped() -> None:
    canvas = Canvas.blank([1], 6, MASK, 2)
    canvas.generated[:2] = 7
    canvas.masked[:2] = False
    sampler = get_sampler("topk")
    row = Row(canvas, sampler, sampler.Params())
    assert (row.block, row.block_masks) == (1, 2)
    finish([row], predictor())
    assert canvas.generated[:2].tolist() == [7, 7] and row.forwards == 4


class Misbehaving(Sampler):
    """Does what its parameters say."""

    name = "misbehaving"
    sees_region = True

    class Params(SamplerParams):
        fault: str = ""

    def select(self, step: Step) -> Selection:
        faults = {params.fault for params in step.params if isinstance(params, self.Params)}
        if "raise" in faults:
            raise ZeroDivisionError("division by zero")
        if "shape" in faults:
            return Selection(step.candidate[:, 1:])
        if "type" in faults:
            return Selection(step.candidate.long())
        commit = step.candidate.clone()
        for i, params in enumerate(step.params):
            if isinstance(params, self.Params) and params.fault == "outside":
                commit[i] = True
            if isinstance(params, self.Params) and params.fault == "nothing":
                commit[i] = False
        return Selection(commit)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "sampler misbehaving failed: ZeroDivisionError: division by zero"),
        ("shape", "a selection's commit must be of shape [1, 8], not [1, 7]"),
        ("type", "a selection's commit must be there and bool"),
        ("outside", "a position that is no candidate was selected"),
    ],
)
def test_a_failing_row_is_left_alone_and_harms_no_other(fault: str, message: str) -> None:
    sampler = Misbehaving()
    rows = [
        Row(Canvas.blank([i + 1], 8, MASK, 4), sampler, sampler.Params(fault=fault if i == 2 else "")) for i in range(5)
    ]
    outcomes = turn(rows, predictor())
    for i, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if i == 2:
            assert message in str(outcome.error)
            assert row.canvas.masked.all() and row.forwards == 0
        else:
            assert outcome.error is None and outcome.positions == [0, 1, 2, 3]
    with pytest.raises(SamplerError, match="misbehaving failed"):
        finish(rows, predictor())


def test_a_sampler_that_selects_nothing_gets_the_surest_candidate() -> None:
    sampler = Misbehaving()
    row = Row(Canvas.blank([1], 6, MASK), sampler, sampler.Params(fault="nothing"))
    assert [positions for positions, _ in steps(row, END_FIRST)] == [[2], [3], [4], [1], [0], [5]]


def test_rows_of_different_samplers_and_lengths_share_a_step() -> None:
    def make() -> list[Row]:
        names = ["topk", "random", "threshold"] * 3
        return [
            Row(
                Canvas.blank([1] * (i % 4), 3 + i, MASK, 1 + i % 5),
                get_sampler(name),
                get_sampler(name).Params(),
                TokenChoice(0.4 * (i % 3)),
                seed=i,
            )
            for i, name in enumerate(names)
        ]

    together, alone = make(), make()
    finish(together, predictor())
    for a, b in zip(together, alone, strict=True):
        finish([b], predictor())
        assert a.canvas.tokens.equal(b.canvas.tokens) and a.forwards == b.forwards


class Careless(Sampler):
    """Does to the loop what no sampler may."""

    name = "careless"

    class Params(SamplerParams):
        fault: str = ""

    def select(self, step: Step) -> Selection:
        if any(params.fault == "panic" for params in step.params if isinstance(params, self.Params)):
            raise Panic("native code")
        return Selection(step.candidate.zero_())


class Panic(BaseException):
    """What extension modules raise that are written in Rust."""


def test_a_sampler_that_changes_what_it_is_given_still_ends() -> None:
    row = Row(Canvas.blank([1], 6, MASK), rule := Careless(), rule.Params())
    finish([row], predictor())
    assert row.finished and row.forwards == 6


def test_a_sampler_that_panics_fails_its_own_generation() -> None:
    rule = Careless()
    rows = [Row(Canvas.blank([i], 6, MASK), rule, rule.Params(fault="panic" * (i == 1))) for i in range(3)]
    outcomes = turn(rows, predictor())
    assert ["Panic: native code" in str(outcome.error) for outcome in outcomes] == [False, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text_length": 0}, "gen_length must be at least 1"),
        ({"text_length": 4, "block_length": -1}, "block_length must be at least 1"),
    ],
)
def test_impossible_canvases_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Canvas.blank([1], mask_id=MASK, **arguments)


def test_layout_of_blocks() -> None:
    layout = Canvas.blank([1, 2], 10, MASK, 4, suffix=[3]).layout
    assert (layout.length, layout.blocks, [layout.block_size(b) for b in range(3)]) == (13, 3, [4, 4, 2])
    assert Canvas.blank([], 10, MASK).layout.block_length == 10
    assert Canvas.blank([], 10, MASK, 99).layout.block_length == 10


def test_a_forward_that_fails_for_one_generation_fails_that_one() -> None:
    """By its place among the generations, whatever widths they have, and views."""
    guidance = get_modifier("guidance")
    views = [(guidance, guidance.Params(scale=1.0))]

    def make() -> list[Row]:
        topk, margin = get_sampler("topk"), get_sampler("margin")
        return [
            Row(Canvas.blank([1], 6, MASK), topk, topk.Params(), modifiers=views),
            Row(Canvas.blank([2], 200, MASK), topk, topk.Params(k=40)),
            Row(Canvas.blank([3], 6, MASK), margin, margin.Params(), modifiers=views),
            Row(Canvas.blank([4], 5, MASK), topk, topk.Params()),
        ]

    for bad in range(4):
        rows, clean = make(), make()
        prompts = [int(row.canvas.tokens[0]) for row in rows]

        def predict(query: Query, first: int = prompts[bad]) -> Prediction:
            heads = query.canvases
            if query.mixture is not None:
                starts = [0, *accumulate(query.mixture.views)][:-1]
                heads = [query.canvases[start] for start in starts]
            failed = {i: OSError("away") for i, canvas in enumerate(heads) if canvas.tokens[0] == first}
            return replace(predictor()(query), failed=failed)

        events = events_of(rows, predict)
        assert "the forward pass failed: OSError" in str(events[bad][0].error)
        finish(clean, predictor())
        assert [row.told for i, row in enumerate(rows) if i != bad] == [
            row.told for i, row in enumerate(clean) if i != bad
        ]
