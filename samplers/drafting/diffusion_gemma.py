"""Draft everything, keep what is surest, and let go of the rest."""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoice
from samplers.ranking import prefix


@dataclass(frozen=True)
class _Drafts:
    """The likeliest tokens of a block in its last steps, the newest last."""

    block: int = -1
    tokens: tuple[Tensor, ...] = ()


class DiffusionGemma(Sampler):
    """Draw all tokens of a block in each forward, keep the surest of them within a bound, make the others noise again.

    The likeliest tokens are what counts in the end: when they have stayed the same and the model is sure of them, or
    the steps are used up, they are committed all at once. The temperature falls from step to step. DiffusionGemma's own
    sampler, an EB-Sampler (arXiv 2505.24857) that may change its mind.
    """

    name = "diffusion_gemma"
    paper = "https://arxiv.org/abs/2505.24857"
    statistics = frozenset({Statistic.CHOSEN_ENTROPY, Statistic.LIKELIEST})
    top = 1
    greedy = True
    drafts = True

    class Params(SamplerParams):
        entropy_bound: float = Field(
            0.1, ge=0, le=100_000, description="keep the surest for as long as those before sum up to this, in nats"
        )
        t_min: float = Field(0.4, ge=0, le=10, description="temperature that the last step comes near to")
        t_max: float = Field(0.8, gt=0, le=10, description="temperature of the first step")
        max_denoising_steps: int = Field(48, ge=1, le=1000, description="most forward passes of a block")
        stability_threshold: int = Field(
            1, ge=0, le=1000, description="steps before this one that must have had the same likeliest tokens"
        )
        confidence_threshold: float = Field(
            0.005, ge=0, le=100, description="commit them where the mean entropy is < this, in nats"
        )

    def start(self, params: SamplerParams) -> _Drafts:
        return _Drafts()

    def draft_steps(self, params: SamplerParams) -> int:
        assert isinstance(params, DiffusionGemma.Params)
        return params.max_denoising_steps

    def choice(self, params: SamplerParams, block_step: int) -> TokenChoice:
        assert isinstance(params, DiffusionGemma.Params)
        left = (params.max_denoising_steps - block_step) / params.max_denoising_steps
        return TokenChoice(params.t_min + (params.t_max - params.t_min) * left)

    def select(self, step: Step) -> Selection:
        entropy = step.extra[Statistic.CHOSEN_ENTROPY]
        order = entropy.masked_fill(~step.candidate, torch.inf).argsort(dim=1, stable=True)
        # What is no candidate comes last, and counts for nothing.
        ordered = entropy.masked_fill(~step.candidate, 0.0).gather(1, order)
        kept = prefix(ordered.cumsum(dim=1) - ordered <= step.param("entropy_bound"), order)
        likeliest = step.extra[Statistic.LIKELIEST].nan_to_num(-1.0).long()
        states = [self._drafts(step, i, likeliest[i]) for i in range(len(likeliest))]
        steady = [self._steady(state, params) for state, params in zip(states, step.params, strict=True)]
        mean = ordered.sum(dim=1, keepdim=True) / step.candidate.sum(dim=1, keepdim=True)
        done = torch.tensor(steady)[:, None] & (mean < step.param("confidence_threshold"))
        assert step.top is not None
        return Selection(
            step.candidate & done,
            token=likeliest,
            confidence=step.top[:, :, 0],
            states=states,
            draft=step.token.where(kept, self.noise(step)),
        )

    def noise(self, step: Step) -> Tensor:
        """Any tokens, from each row's own stream, int64 [rows, width]."""
        sizes = torch.tensor([layout.pattern.noise or 0 for layout in step.layouts])[:, None]
        return (step.uniform() * sizes).long()

    def _drafts(self, step: Step, row: int, likeliest: Tensor) -> _Drafts:
        """What there is to compare the next step's likeliest tokens with, and this one's."""
        state: Any = step.states[row]
        params: Any = step.params[row]
        block = int(step.block[row])
        before = state.tokens if state.block == block else ()
        return _Drafts(block, (*before, likeliest[step.candidate[row]])[-params.stability_threshold - 1 :])

    def _steady(self, state: _Drafts, params: Any) -> bool:
        """Whether as many steps as there must be had the same likeliest tokens as the last."""
        *before, last = state.tokens
        return len(before) >= params.stability_threshold and all(tokens.equal(last) for tokens in before)
