"""The region that is denoised for a text, and what was told of it: it never changes."""

import zlib

import pytest
import torch
from torch import Tensor

from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    Canvas,
    Layout,
    Sampler,
    SamplerError,
    Selection,
    Step,
    get_sampler,
)
from samplers.loop.row import Row
from samplers.loop.run import finish, run
from tests.samplers.models import MASK, VOCAB, predictor


def causal_logits(canvas: Canvas) -> Tensor:
    """Logits of a model in blocks of 8: they depend on all of a position's block and what is before it."""
    tokens, out = canvas.tokens.tolist(), []
    for start in range(0, len(tokens), 8):
        seed = zlib.crc32(repr(tokens[: start + 8]).encode())
        out.append(
            torch.randn(len(tokens[start : start + 8]), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
        )
    return torch.cat(out)


def region(
    prompt: int, text: int, pattern: AttentionPattern, block: int | None = None, longest: int | None = None
) -> Layout:
    mask = None if pattern.noise else MASK
    return Canvas.blank([1] * prompt, text, mask, block, pattern=pattern, max_length=longest).layout


def test_what_is_written_block_by_block_is_denoised_in_whole_blocks() -> None:
    """Blocks count from the canvas's start where the model is block-causal, from the region's where it drafts."""
    own, fixed, drafting = (
        AttentionPattern(causal_block=32),
        AttentionPattern(causal_block=32, fixed=True),
        AttentionPattern(noise=99, drafted=256),
    )
    assert [region(5, text, own).gen_length for text in (1, 3, 27, 28, 64)] == [27, 27, 27, 59, 91]
    assert region(5, 3, own, block=4).gen_length == 3, "the request's blocks are the model's"
    assert region(5, 4, own, block=4).gen_length == 7
    assert region(5, 3, fixed, block=4).gen_length == 27, (
        "the model's own blocks are whole, whatever is denoised together"
    )
    assert [region(5, text, drafting).gen_length for text in (3, 256, 257)] == [256, 256, 512]
    assert region(5, 3, drafting, block=10).gen_length == 10
    assert region(5, 3, BIDIRECTIONAL, block=4).gen_length == 3, "what sees everything is as long as it was asked for"
    layout = region(5, 3, own)
    assert (layout.text_length, layout.cut, layout.missing, layout.blocks) == (3, 24, 0, 1)


def test_the_last_block_ends_with_the_context() -> None:
    for pattern, whole in ((AttentionPattern(causal_block=32), 27), (AttentionPattern(noise=99, drafted=32), 32)):
        layout = region(5, 3, pattern, longest=20)
        assert (layout.length, layout.gen_length, layout.text_length, layout.missing) == (20, 15, 3, whole - 15)
        assert region(5, 3, pattern, longest=99).missing == 0


@pytest.mark.parametrize("name", ["threshold", "topk", "edit", "hierarchy_remask"])
def test_the_text_is_cut_and_ends_when_it_is_there(name: str) -> None:
    """Three tokens are those that 20 begin with; an end-of-text beyond the text does not end it."""
    sampler = get_sampler(name)

    def written(text: int, ends: frozenset[int] = frozenset()) -> Row:
        canvas = Canvas.blank([1, 2], text, MASK, pattern=AttentionPattern(causal_block=8))
        row = Row(canvas, sampler, sampler.Params(), end_ids=ends, fill_after_end=False)
        finish([row], predictor(causal_logits))
        return row

    long, short = written(20), written(3)
    assert len(long.told) == long.completion_tokens == 20
    assert short.told == long.told[:3] == short.text_tokens()
    assert short.finished and not short.ended
    beyond = frozenset({long.told[3], long.told[4]}) - frozenset(long.told[:3])
    assert beyond
    assert written(3, beyond).told == written(20, beyond).told[:3] and not written(3, beyond).ended


class Forgetful(Sampler):
    """Masks again, or replaces, positions that are told of and settled, or that it was not asked about."""

    revises = whole_region = True
    name = "forgetful"

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions

    def select(self, step: Step) -> Selection:
        remask = torch.zeros_like(step.candidate)
        remask[:, self.positions] = step.block > 0
        none = torch.zeros_like(remask)
        return Selection(step.candidate, replace=none, remask=remask, done=torch.ones(len(none), dtype=torch.bool))


@pytest.mark.parametrize("positions", [[0], [1], [3, 4]])
def test_what_was_told_cannot_change(positions: list[int]) -> None:
    row = Row(Canvas.blank([1], 6, MASK, 2), rule := Forgetful(positions), rule.Params())
    told: list[int] = []
    steps = run([row], predictor())
    for _ in range(20):
        ((_, event),) = next(steps)
        assert row.told[: len(told)] == told
        told = list(row.told)
        if event.error is not None:
            break
    assert isinstance(event.error, SamplerError) and told
