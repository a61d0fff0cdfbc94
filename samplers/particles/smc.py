"""Sequential Monte Carlo over several texts: the likelier ones continue."""

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.columns import Columns
from samplers.contract import (
    ParameterError,
    Resampling,
    Resources,
    Sampler,
    SamplerParams,
    Selection,
    Slots,
    StateSpec,
    Step,
    StepContext,
    TokenBonus,
)
from samplers.ranking import surest

WEIGHT, TOTAL = "smc_weight", "smc_total"
"""Log-likelihood of a canvas's commits: since the last resampling, and in total."""


class SMCParams(SamplerParams):
    particles: int = Field(4, ge=1, le=64, description="texts written at a time; each costs its own forward passes")
    ess: float = Field(
        0.5,
        ge=0,
        le=1,
        description="draw texts anew after a block where the effective number of them is below this share",
    )
    base: str = Field("threshold", min_length=1, max_length=64, description="sampler that each text is written with")
    base_params: dict[str, Any] = Field({}, description="that sampler's parameters")


class SMC(Sampler[SMCParams]):
    """Write several texts with a base sampler, and after each block go on with the likelier ones; the likeliest wins.

    Self-rewarding sequential Monte Carlo, arXiv 2602.01849: weights are the model's own probabilities of what was
    committed, and texts are drawn anew by systematic resampling. Give a temperature, or all texts are the same.
    """

    name = "smc"
    paper = "https://arxiv.org/abs/2602.01849"
    requires = {"base": "sampler"}
    counts_commits = True
    Params = SMCParams

    def __init__(self, base: Sampler[Any] | None = None) -> None:
        self.base = base
        self._bound: dict[str, SMC] = {}
        if base is not None:
            self.statistics, self.top = base.statistics, base.top
            self.whole_region, self.sees_region = base.whole_region, base.sees_region
            self.chooses_tokens = base.chooses_tokens
            own = StateSpec(0.0, torch.float64, lives="generation")
            self.state = {**base.state, WEIGHT: own, TOTAL: own}

    def bind(self, resources: Resources, params: SMCParams) -> "SMC":
        if self.base is not None:
            return self
        base: Sampler[Any] = resources.find("sampler", params.base)
        if base.revises or base.drafts or base.requires:
            raise ParameterError("base", f"sampler {params.base} cannot be the base of smc: it revises or needs more")
        _own_params(base, params)
        return self._bound.setdefault(params.base, SMC(base))

    def check(self, params: SMCParams, layout: Layout) -> None:
        base = self._base()
        try:
            base.check(_own_params(base, params), layout)
        except ParameterError as error:
            field = error.field if error.field.startswith("base_params") else f"base_params.{error.field}"
            raise ParameterError(field, str(error), error.code) from None

    def incompatibility(self, pattern: AttentionPattern) -> str | None:
        return super().incompatibility(pattern) if self.base is None else self.base.incompatibility(pattern)

    def most_forwards(self, params: SMCParams, layout: Layout) -> int:
        base = self._base()
        return base.most_forwards(_own_params(base, params), layout)

    def slots(self, params: SMCParams) -> int:
        return params.particles

    def name_tokens(self, context: StepContext[SMCParams]) -> Tensor | None:
        return self._base().name_tokens(self._as_base(context))

    def bonus(self, context: StepContext[SMCParams]) -> TokenBonus | None:
        return self._base().bonus(self._as_base(context))

    def select(self, step: Step[SMCParams]) -> Selection:
        chosen = self._base().select(self._as_base(step))
        commit = chosen.commit
        none = ~commit.any(dim=1, keepdim=True)
        commit = commit | (surest(step.confidence, step.candidate) & none)
        probability = step.confidence if step.probability is None else step.probability
        gain = probability.double().log().where(commit, 0.0).sum(dim=1, keepdim=True)
        state = {name: step.state[name] + gain for name in (WEIGHT, TOTAL)}
        return replace(chosen, commit=commit, state={**(chosen.state or {}), **state})

    def resample(self, slots: Slots[SMCParams]) -> Resampling | None:
        weight = slots.state[WEIGHT][:, 0].softmax(dim=0)
        if 1 / (weight * weight).sum() >= slots.params.ess * len(weight):
            return None
        ancestors = systematic(weight, slots.uniform)
        return Resampling(ancestors, {WEIGHT: torch.zeros_like(slots.state[WEIGHT])})

    def winner(self, slots: Slots[SMCParams]) -> int:
        return int(slots.state[TOTAL][:, 0].argmax())

    def _base(self) -> Sampler[Any]:
        if self.base is None:
            raise ParameterError("base", "smc has not been given its base sampler")
        return self.base

    def _as_base(self, context: Any) -> Any:
        """The step as the base sampler sees it."""
        base = self._base()

        def make() -> tuple[list[SamplerParams], Columns]:
            params = [_own_params(base, each) for each in context.params]
            return params, Columns.of(params, context.candidate.device)

        params, columns = context.columns.keep("base", make)
        return replace(context, params=params, columns=columns)


def _own_params(base: Sampler[Any], params: SMCParams) -> SamplerParams:
    """The base sampler's parameters. Raises ParameterError."""
    try:
        return base.Params(**params.base_params)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(("base_params", *map(str, first["loc"])))
        raise ParameterError(field, f"{field}: {first['msg']}") from None


def systematic(weight: Tensor, uniform: float) -> Tensor:
    """Systematic resampling: int64 [n] indices for weights [n] that sum to 1, as evenly spread as they allow.

    Args:
        uniform: one number in [0, 1) for all draws.
    """
    count = len(weight)
    at = (uniform + torch.arange(count, dtype=weight.dtype, device=weight.device)) / count
    return torch.searchsorted(weight.cumsum(0), at).clamp(max=count - 1)
