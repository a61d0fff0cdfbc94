"""How many candidates to commit a step: a fixed number, or a number of steps to spread the masks over."""

from collections.abc import Sequence

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


class ScheduledSampler(Sampler):
    """A rule whose parameters may name a number of steps."""

    Params = ScheduledParams

    def check(self, params: SamplerParams, layout: Layout) -> None:
        check_steps(params, layout)

    def most_forwards(self, params: SamplerParams, layout: Layout) -> int:
        most = super().most_forwards(params, layout)
        if isinstance(params, NumberOrThresholdParams) and params.threshold is not None:
            return most  # one a forward is all that a threshold promises
        return min(most, scheduled_forwards(params, layout))


def check_steps(params: SamplerParams, layout: Layout) -> None:
    """Refuse fewer steps than blocks: every block needs a forward."""
    steps = getattr(params, "steps", None)
    if steps is not None and steps < layout.blocks:
        raise ParameterError(
            "steps",
            f"steps is {steps}, but {layout.blocks} blocks need at least {layout.blocks}: raise steps or block_length",
        )


def scheduled_forwards(params: SamplerParams, layout: Layout) -> int:
    """Most forwards where each commits what the schedule says, or more."""
    # Where outputs are about the next position, a block's first forward may decide that position only.
    opening = layout.blocks if layout.pattern.shifted else 0
    steps, k = getattr(params, "steps", None), getattr(params, "k", None)
    if steps is not None:
        return opening + int(steps)
    return opening + sum(-(-layout.block_size(block) // (k or 1)) for block in range(layout.blocks))


def share_of(steps: int, layout: Layout, block: int) -> int:
    """A block's share of the steps of the whole generation."""
    return steps // layout.blocks + (block < steps % layout.blocks)


def quota(step: Step) -> Tensor:
    """Candidates to commit in this step, int64 [rows, 1].

    With S of the `steps` for a block of m masks, step s commits m // S, and one more while s < m % S.
    """
    rows = []
    counters = zip(
        step.params, step.layouts, step.block.tolist(), step.block_step.tolist(), step.block_masks.tolist(), strict=True
    )
    for params, layout, (block,), (s,), (masks,) in counters:
        assert isinstance(params, ScheduledParams)
        if params.steps is None:
            rows.append(params.k or 1)
        else:
            share = share_of(params.steps, layout, block)
            rows.append(masks // share + (s < masks % share))
    return torch.tensor(rows, device=step.candidate.device)[:, None]


def passing_or_best(step: Step, score: Tensor, bounds: Sequence[float | None]) -> Selection:
    """Rows with a bound commit every candidate whose score reaches it, one at least; the others their quota's best."""
    bound = score.new_tensor([torch.inf if value is None else value for value in bounds])[:, None]
    counted = torch.tensor([value is None for value in bounds], device=score.device)[:, None]
    # Where the bound lets nothing through, the best score goes, not the largest confidence.
    count = quota(step).where(counted, 1)
    return Selection(best(score, step.candidate, count) | (step.candidate & (score >= bound)))
