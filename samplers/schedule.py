"""How many candidates to commit a step: a fixed number, or a number of steps to spread the masks over."""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from samplers.base import ParameterError, SamplerParams, Step
from samplers.canvas import Layout


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


def check_steps(params: SamplerParams, layout: Layout) -> None:
    """Refuse fewer steps than blocks: every block needs a forward."""
    steps = getattr(params, "steps", None)
    if steps is not None and steps < layout.blocks:
        raise ParameterError(
            "steps",
            f"steps is {steps}, but {layout.blocks} blocks need at least {layout.blocks}: raise steps or block_length",
        )


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
            share = params.steps // layout.blocks + (block < params.steps % layout.blocks)
            rows.append(masks // share + (s < masks % share))
    return torch.tensor(rows, device=step.candidate.device)[:, None]
