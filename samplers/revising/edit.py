"""Commit boldly, and change one's mind."""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.ranking import best


@dataclass(frozen=True)
class _Post:
    """Forwards spent on a block without masks."""

    block: int = -1
    steps: int = 0


class Edit(Sampler):
    """Commit candidates above a threshold, and replace committed tokens of the block that the model would now change.

    LLaDA2.1, arXiv 2602.08676, as in SGLang's JointThreshold: a block without masks goes on until a forward changes
    nothing. Pays with models that were trained to edit. LLaDA2.1's own `generate` has threshold 0.95, edit_threshold
    0.9 and `num_to_transfer` for k.
    """

    name = "edit"
    paper = "https://arxiv.org/abs/2602.08676"
    revises = True

    class Params(SamplerParams):
        threshold: float = Field(0.7, ge=0, le=1, description="commit candidates with confidence > this")
        k: int = Field(1, ge=1, le=1_000_000, description="but at least so many per forward pass, the surest")
        edit_threshold: float | None = Field(
            0.5, ge=0, le=1, description="replace where another token has a probability > this; null never replaces"
        )
        max_post_steps: int = Field(16, ge=0, le=1000, description="most forwards of a block without masks")
        penalty: float = Field(
            0.0, ge=0, le=100, description="taken off the logit of the token that stands to the left, against repeats"
        )

    def start(self, params: SamplerParams) -> _Post:
        return _Post()

    def post_steps(self, params: SamplerParams) -> int:
        assert isinstance(params, Edit.Params)
        return params.max_post_steps

    def bonus(self, params: SamplerParams, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        assert isinstance(params, Edit.Params)
        if not params.penalty:
            return None
        index = (places > 0).nonzero()[:, 0]
        return index, tokens[places[index] - 1], torch.full((len(index),), -params.penalty)

    def select(self, step: Step) -> Selection:
        assert step.current is not None and step.given is not None
        sure = step.candidate & (step.confidence > step.param("threshold"))
        sure = sure | best(step.confidence, step.candidate, step.param("k"))
        bounds = [2.0 if p.edit_threshold is None else p.edit_threshold for p in step.params]  # type: ignore[attr-defined]
        limit = step.confidence.new_tensor(bounds)[:, None]
        known = (step.confidence > -torch.inf) & ~step.masked & ~step.given
        replace = known & (step.token != step.current) & (step.confidence > limit)
        spent = [self._spent(step, i) for i in range(len(step.params))]
        most = [p.max_post_steps for p in step.params]  # type: ignore[attr-defined]
        changes = replace.any(dim=1).tolist()
        done = [
            limit == 0 or (post.steps > 0 and (not changed or post.steps >= limit))
            for post, changed, limit in zip(spent, changes, most, strict=True)
        ]
        return Selection(sure, replace=replace, done=torch.tensor(done, device=sure.device), states=spent)

    def _spent(self, step: Step, row: int) -> _Post:
        """Forwards on the row's block since it has had no mask, this one included."""
        state: Any = step.states[row]
        block = int(step.block[row])
        before = state.steps if state.block == block else 0
        return _Post(block, 0 if bool(step.candidate[row].any()) else before + 1)
