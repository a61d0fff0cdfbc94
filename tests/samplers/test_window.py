"""Rules that say where their candidates are: two blocks open at a time, as in D2F."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    CacheMode,
    Canvas,
    Sampler,
    SamplerParams,
    Selection,
    Step,
    StepContext,
    TokenChoice,
    Window,
    get_sampler,
)
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query
from tests.samplers.models import MASK, VOCAB, events_of, predictor


class TwoBlocks(Sampler[SamplerParams]):
    """Commit what is sure enough of the first two blocks with a mask (D2F, arXiv 2508.09192, without its weights)."""

    name = "two_blocks"
    threshold = 0.5

    def window(self, context: StepContext) -> Window:
        assert context.candidate.shape == context.position.shape
        return Window(context.block_start, context.block_start + 2 * context.layout.block_length)

    def select(self, step: Step) -> Selection:
        inside = (step.position >= step.block_start) & (step.position < step.block_start + 2 * step.layout.block_length)
        assert not bool((step.candidate & ~inside).any())
        return Selection(step.candidate & (step.confidence >= self.threshold))


class Anywhere(TwoBlocks):
    """A window of any bounds."""

    name = "anywhere"

    def __init__(self, start: int, stop: int) -> None:
        self.bounds = start, stop

    def window(self, context: StepContext) -> Window:
        start, stop = (torch.full_like(context.block_start, bound) for bound in self.bounds)
        return Window(start, stop)

    def select(self, step: Step) -> Selection:
        return Selection(step.candidate & (step.confidence >= self.threshold))


def row(rule: Sampler, **options: Any) -> Row:
    pattern = options.pop("pattern", BIDIRECTIONAL)
    canvas = Canvas.blank([1, 2], options.pop("gen", 16), MASK, options.pop("block", 4), pattern=pattern)
    return Row(canvas, rule, SamplerParams(), vocabulary=VOCAB, **options)


def test_two_blocks_are_open() -> None:
    each = row(TwoBlocks())
    assert next_query([each]).position.tolist() == list(range(2, 10))
    (events,) = events_of([each], predictor())
    assert any(max(event.positions) - min(event.positions) >= 4 for event in events)
    assert sorted(place for event in events for place in event.positions) == list(range(16))
    assert all(event.error is None for event in events) and len(events) <= 16


def test_what_was_committed_early_waits_to_be_told() -> None:
    each = row(TwoBlocks())
    (events,) = events_of([each], predictor())
    done: set[int] = set()
    for event in events:
        done |= set(event.positions)
        prefix = next(i for i in range(17) if i not in done)
        assert event.settled == prefix


@pytest.mark.parametrize("cache", [CacheMode.PREFIX, CacheMode.DUAL])
def test_with_a_cache_the_window_is_the_active_block(cache: CacheMode) -> None:
    each = row(TwoBlocks(), cache=cache)
    (events,) = events_of([each], predictor())
    assert all(event.error is None and len({place // 4 for place in event.positions}) == 1 for event in events)
    blocks = [event.positions[0] // 4 for event in events]
    assert blocks == sorted(blocks) and each.finished


@pytest.mark.parametrize("pattern", [AttentionPattern(causal_block=4), AttentionPattern(causal_block=4, shifted=True)])
@pytest.mark.parametrize("cache", list(CacheMode))
def test_in_a_block_causal_model_the_window_is_the_active_block(pattern: AttentionPattern, cache: CacheMode) -> None:
    each = row(TwoBlocks(), pattern=pattern, cache=cache)
    (events,) = events_of([each], predictor())
    assert all(event.error is None for event in events) and each.finished
    assert all(len({(place + 2) // 4 for place in event.positions}) == 1 for event in events)


def test_shifted_models_have_windows_too() -> None:
    each = row(TwoBlocks(), pattern=AttentionPattern(shifted=True))
    (events,) = events_of([each], predictor())
    assert all(event.error is None for event in events) and each.finished
    assert any(max(event.positions) - min(event.positions) >= 4 for event in events)


@settings(max_examples=20)
@given(
    start=st.integers(-40, 40),
    stop=st.integers(-40, 40),
    cache=st.sampled_from(list(CacheMode)),
    pattern=st.sampled_from([BIDIRECTIONAL, AttentionPattern(causal_block=4), AttentionPattern(shifted=True)]),
    ends=st.sampled_from([frozenset[int](), frozenset({7})]),
    fill=st.booleans(),
)
def test_any_window_ends_with_one_commit_a_step(
    start: int, stop: int, cache: CacheMode, pattern: AttentionPattern, ends: frozenset[int], fill: bool
) -> None:
    """The loop keeps the first mask inside."""
    each = row(Anywhere(start, stop), cache=cache, pattern=pattern, end_ids=ends, fill_after_end=fill)
    (events,) = events_of([each], predictor())
    assert all(event.error is None and event.positions for event in events)
    assert each.finished and each.forwards <= each.canvas.layout.gen_length


def test_a_window_that_is_everything_is_full_diffusion() -> None:
    blocks, full = row(Anywhere(0, 99)), row(get_sampler("threshold"), block=16)
    full = Row(full.canvas, full.sampler, full.sampler.Params(threshold=0.5), vocabulary=VOCAB)
    finish([blocks, full], predictor())
    assert blocks.told == full.told and blocks.forwards == full.forwards


def test_rows_with_windows_share_a_step_with_others() -> None:
    def make() -> list[Row]:
        rule = TwoBlocks()
        topk = get_sampler("topk")
        return [
            row(rule),
            Row(Canvas.blank([1], 9, MASK, 3), topk, topk.Params(k=2), TokenChoice(0.7), seed=2),
            row(rule, gen=7, block=3),
            row(rule, gen=40, block=8, cache=CacheMode.DUAL),
        ]

    together = make()
    finish(together, predictor())
    for a, b in zip(together, make(), strict=True):
        finish([b], predictor())
        assert (a.told, a.forwards) == (b.told, b.forwards)
