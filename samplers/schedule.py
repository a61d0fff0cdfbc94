"""Schedules: a fixed number of candidates per step, or a number of steps to spread the masks over."""

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from samplers.canvas import Layout
from samplers.contract import ParameterError, Sampler, SamplerParams, Selection, Step
from samplers.ranking import best


class ScheduledParams(SamplerParams):
    """`k` tokens a forward, or `steps` forwards in all (LLaDA, arXiv 2502.09992); neither means one a forward."""

    k: int | None = Field(None, ge=1, le=1_000_000, description="candidates committed per forward pass (default 1)")
    steps: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="forward passes for the whole generation, shared out over its blocks; at least one a block",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> "ScheduledParams":
        if self.k is not None and self.steps is not None:
            raise ValueError("give k or steps, not both")
        return self


class NumberOrThresholdParams(ScheduledParams):
    """A number of tokens, or a bound that all must pass."""

    threshold: float | None = None

    @model_validator(mode="after")
    def _a_number_or_a_threshold(self) -> "NumberOrThresholdParams":
        if self.threshold is not None and (self.k is not None or self.steps is not None):
            raise ValueError("give threshold or a number of tokens, not both")
        return self


class ScheduledSampler(Sampler[ScheduledParams]):
    """A rule whose parameters may name a number of steps."""

    Params: ClassVar[type[SamplerParams]] = ScheduledParams

    def check(self, params: ScheduledParams, layout: Layout) -> None:
        check_steps(params, layout)

    def most_forwards(self, params: ScheduledParams, layout: Layout) -> int:
        most = super().most_forwards(params, layout)
        if isinstance(params, NumberOrThresholdParams) and params.threshold is not None:
            return most  # a threshold guarantees only one commit per forward
        return min(most, scheduled_forwards(params, layout))


def check_steps(params: SamplerParams, layout: Layout) -> None:
    """Raise ParameterError if there are fewer steps than blocks: every block needs a forward."""
    steps = getattr(params, "steps", None)
    if steps is not None and steps < layout.blocks:
        raise ParameterError(
            "steps",
            f"steps is {steps}, but {layout.blocks} blocks need at least {layout.blocks}: raise steps or block_length",
        )


def scheduled_forwards(params: SamplerParams, layout: Layout) -> int:
    """Maximum forwards of a rule that commits at least the scheduled number in each."""
    # If outputs predict the next position, a block's first forward may decide only the block's first position.
    opening = layout.blocks if layout.pattern.shifted else 0
    steps, k = getattr(params, "steps", None), getattr(params, "k", None)
    if steps is not None:
        return opening + int(steps)
    return opening + sum(-(-layout.block_size(block) // (k or 1)) for block in range(layout.blocks))


def block_share(steps: Tensor, blocks: Tensor, block: Tensor) -> Tensor:
    """Share of a block in the steps of the whole generation, int64 [rows, 1]."""
    return steps // blocks + (block < steps % blocks)


def quota(step: Step[ScheduledParams]) -> Tensor:
    """Number of candidates to commit in this step, int64 [rows, 1].

    With S of the `steps` for a block of m masks, step s commits m // S, plus one while s < m % S.
    """
    k = step.param("k", none=1) if "k" in step.columns.spec.kinds else torch.ones_like(step.block)
    if not step.columns.any_given("steps"):
        return k
    # A schedule has at least one step per block (`check_steps`); 1 stands in for rows without a schedule.
    share = block_share(step.param("steps", none=0), step.layout.blocks, step.block).clamp(min=1)
    count = step.block_masks // share + (step.block_step < step.block_masks % share)
    return torch.where(step.given("steps"), count, k)


def quota_for_best(step: Step[ScheduledParams]) -> Tensor | int:
    """The quota; a plain number if it is the same for all rows and steps, since `best` is then faster."""
    if step.columns.any_given("steps"):
        return quota(step)

    def same() -> Tensor | int:
        k = quota(step)
        return int(k[0]) if bool((k == k[0]).all()) else k

    found: Tensor | int = step.columns.keep("quota", same)
    return found


def passing_or_best(step: Step[ScheduledParams], score: Tensor, bound: Tensor) -> Selection:
    """Commit by threshold or by quota.

    Rows with a `threshold` commit all candidates whose score reaches `bound`, [rows, 1], and at least one. Other rows
    commit the best of their quota.
    """
    if not step.columns.any_given("threshold"):
        return Selection(best(score, step.candidate, quota_for_best(step)))
    # If nothing reaches the bound, commit the best score, which need not be the highest confidence.
    counted = ~step.given("threshold")
    count = torch.where(counted, quota(step), 1)
    return Selection(best(score, step.candidate, count) | (step.candidate & (score >= bound) & ~counted))
