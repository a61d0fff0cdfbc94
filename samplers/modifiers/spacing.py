"""Minimum distance between commits of one step."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from samplers.attention_pattern import AttentionPattern
from samplers.contract import Modifier, Sampler, SamplerParams, Selection, Step


class SpacingParams(SamplerParams):
    min_gap_start: int = Field(
        8, ge=1, le=1_000_000, description="least distance between commits of a step while a block is all masks"
    )
    min_gap: int = Field(2, ge=1, le=1_000_000, description="least distance at the block's end")


class Spacing(Modifier[SpacingParams]):
    """Of what the rule chose, commit the surest first and leave out what is too near to it.

    The least distance is `min_gap_start` times the share of the block that is masked, rounded down, and `min_gap` at
    least: tokens far apart depend least on one another. Dilated unmasking's filter, arXiv 2506.19037.
    """

    name = "spacing"
    paper = "https://arxiv.org/abs/2506.19037"
    Params = SpacingParams

    def incompatibility(
        self, sampler: Sampler[Any], pattern: AttentionPattern, before: Sequence[Modifier[Any]]
    ) -> str | None:
        if sampler.drafts:
            return f"modifier spacing keeps commits of a step apart, and sampler {sampler.name} commits whole blocks"
        if sampler.counts_commits:
            return f"modifier spacing drops commits, of which sampler {sampler.name} keeps account"
        return None

    def after(self, step: Step[SpacingParams], selection: Selection) -> Selection:
        left = step.candidate.sum(dim=1, keepdim=True)
        gap = (left * step.param("min_gap_start") // step.layout.block_length).maximum(step.param("min_gap"))
        confidence = step.confidence if selection.confidence is None else selection.confidence
        score = confidence.masked_fill(~selection.commit, -torch.inf)
        open_, kept = selection.commit.clone(), torch.zeros_like(selection.commit)
        # Each round keeps the surest of the remaining positions and drops its neighbours.
        while bool(open_.any()):
            first = score.masked_fill(~open_, -torch.inf).max(dim=1, keepdim=True).indices
            some = open_.any(dim=1, keepdim=True)
            place = step.position.gather(1, first)
            kept |= torch.zeros_like(kept).scatter(1, first, True) & some
            open_ &= ~(((step.position - place).abs() < gap) & some)
        return Selection(**{**vars(selection), "commit": kept})
