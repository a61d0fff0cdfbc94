"""Commits by threshold, with later edits."""

import torch
from pydantic import Field

from samplers.contract import Sampler, SamplerParams, Selection, StateSpec, Step, StepContext, TokenBonus
from samplers.ranking import best


class EditParams(SamplerParams):
    threshold: float = Field(0.7, ge=0, le=1, description="commit candidates with confidence > this")
    k: int = Field(1, ge=1, le=1_000_000, description="but at least so many per forward pass, the surest")
    edit_threshold: float | None = Field(
        0.5, ge=0, le=1, description="replace where another token has a probability > this; null never replaces"
    )
    max_post_steps: int = Field(16, ge=0, le=1000, description="most forwards of a block without masks")
    penalty: float = Field(
        0.0, ge=0, le=100, description="taken off the logit of the token that stands to the left, against repeats"
    )


class Edit(Sampler[EditParams]):
    """Commit candidates above a threshold, and replace committed tokens of the block that the model would now change.

    LLaDA2.1, arXiv 2602.08676, as in SGLang's JointThreshold: a block without masks goes on until a forward changes
    nothing. Pays with models that were trained to edit. LLaDA2.1's own `generate` has threshold 0.95, edit_threshold
    0.9 and `num_to_transfer` for k.
    """

    name = "edit"
    paper = "https://arxiv.org/abs/2602.08676"
    revises = True
    state = {"post_steps": StateSpec(0, torch.int64)}  # forwards on the block since its last mask was committed
    Params = EditParams

    def post_steps(self, params: EditParams) -> int:
        return params.max_post_steps

    def bonus(self, context: StepContext[EditParams]) -> TokenBonus | None:
        if not any(params.penalty for params in context.params):
            return None
        left = context.tokens_at(context.position - 1)
        left = left.masked_fill(context.param("penalty") == 0, -1)
        return TokenBonus(left[..., None], -context.param("penalty").expand(left.shape)[..., None])

    def select(self, step: Step[EditParams]) -> Selection:
        sure = step.candidate & (step.confidence > step.param("threshold"))
        sure = sure | best(step.confidence, step.candidate, step.param("k"))
        unsure = step.confidence > step.param("edit_threshold", none=2.0)
        replace = step.committed & (step.token != step.current) & unsure
        masks = step.candidate.any(dim=1, keepdim=True)
        spent = torch.where(masks, 0, step.state["post_steps"] + 1)
        most, changes = step.param("max_post_steps"), replace.any(dim=1, keepdim=True)
        done = (most == 0) | ((spent > 0) & (~changes | (spent >= most)))
        return Selection(sure, replace=replace, done=done[:, 0], state={"post_steps": spent})
