"""Draft all tokens, keep the most confident, and renew the rest."""

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, StateSpec, Step, StepContext
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoices
from samplers.ranking import prefix


class DiffusionGemmaParams(SamplerParams):
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


class DiffusionGemma(Sampler[DiffusionGemmaParams]):
    """Draw all tokens of a block in each forward, keep the surest of them within a bound, make the others noise again.

    The likeliest tokens are what counts in the end: when they have stayed the same and the model is sure of them, or
    the steps are used up, they are committed all at once. The temperature falls from step to step. DiffusionGemma's own
    sampler, an EB-Sampler (arXiv 2505.24857) that may change its mind.
    """

    name = "diffusion_gemma"
    paper = "https://arxiv.org/abs/2505.24857"
    statistics = frozenset({Statistic.CHOSEN_ENTROPY, Statistic.LIKELIEST})
    top = 1
    chooses_tokens = True
    drafts = True
    state = {
        "likeliest": StateSpec(-1, torch.int64, per="position"),  # tokens of the previous step
        "same": StateSpec(0, torch.int64),  # number of consecutive steps with the same tokens
    }
    Params = DiffusionGemmaParams

    def draft_steps(self, params: DiffusionGemmaParams) -> int:
        return params.max_denoising_steps

    def choice(self, context: StepContext[DiffusionGemmaParams]) -> TokenChoices:
        steps, t_min, t_max = (context.columns.exact(name) for name in ("max_denoising_steps", "t_min", "t_max"))
        temperature = t_min + (t_max - t_min) * ((steps - context.block_step) / steps)
        return TokenChoices(temperature, torch.ones_like(temperature), torch.zeros_like(context.block_step))

    def select(self, step: Step[DiffusionGemmaParams]) -> Selection:
        entropy = step.extra[Statistic.CHOSEN_ENTROPY]
        order = entropy.masked_fill(~step.candidate, torch.inf).argsort(dim=1, stable=True)
        # Non-candidates sort last and count as 0.
        ordered = entropy.masked_fill(~step.candidate, 0.0).gather(1, order)
        kept = prefix(ordered.cumsum(dim=1) - ordered <= step.param("entropy_bound"), order)
        likeliest = step.extra[Statistic.LIKELIEST].nan_to_num(-1.0).long()
        stays = ((likeliest == step.state["likeliest"]) | ~step.candidate).all(dim=1, keepdim=True)
        same = torch.where(stays, step.state["same"] + 1, 0)
        mean = ordered.sum(dim=1, keepdim=True) / step.candidate.sum(dim=1, keepdim=True)
        done = (same >= step.param("stability_threshold")) & (mean < step.param("confidence_threshold"))
        assert step.top is not None
        return Selection(
            step.candidate & done,
            token=likeliest,
            confidence=step.top[:, :, 0],
            draft=step.token.where(kept, self.noise(step)),
            state={"likeliest": likeliest, "same": same},
        )

    def noise(self, step: Step[DiffusionGemmaParams]) -> Tensor:
        """Random tokens from each row's own stream, int64 [rows, width]."""
        return (step.uniform() * step.layout.noise).long()
