"""Classifier-free guidance."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.contract import Modifier, ParameterError, Sampler, SamplerParams, View
from samplers.prompts import PROMPT

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1 << 20)]


class GuidanceParams(SamplerParams):
    scale: float = Field(ge=0, le=100, description="how far from the unguided logits u: u + (scale + 1) * (guided - u)")
    negative_prompt: str | Tokens | None = Field(
        None,
        json_schema_extra={PROMPT: True},
        description="prompt of the unguided view, text or token ids; null: mask tokens in the prompt's place",
    )


class Guidance(Modifier[GuidanceParams]):
    """Classifier-free guidance: every step is computed with and without the prompt, and logits move apart.

    Logits are (scale + 1) times those with the prompt, minus `scale` times those without. Each step counts as two
    forward passes. LLaDA, arXiv 2502.09992, its generate.py (`cfg_scale`); Nie et al., arXiv 2410.18514, section 4.
    """

    name = "guidance"
    paper = "https://arxiv.org/abs/2410.18514"
    Params = GuidanceParams

    def views(self, params: GuidanceParams, views: Sequence[View]) -> Sequence[View]:
        if params.scale == 0:
            return views
        if isinstance(params.negative_prompt, str):
            raise ParameterError("negative_prompt", "negative_prompt must be encoded before it gets here")
        given = params.negative_prompt
        without = View(-params.scale, "masked" if given is None else tuple(given))
        guided = [View(view.weight * (params.scale + 1), view.prompt) for view in views]
        return [*guided, without]

    def incompatibility(
        self, sampler: Sampler[Any], pattern: AttentionPattern, before: Sequence[Modifier[Any]]
    ) -> str | None:
        if pattern.noise is not None:
            return "modifier guidance is for models with a mask token, and this one has none"
        return None

    def check(self, params: GuidanceParams, layout: Layout) -> None:
        size, tokens = layout.pattern.causal_block, params.negative_prompt
        if size is not None and isinstance(tokens, list) and (len(tokens) - layout.prompt_length) % size:
            raise ParameterError(
                "negative_prompt",
                f"this model reads blocks of {size} positions: the negative prompt's {len(tokens)} tokens and the "
                f"prompt's {layout.prompt_length} must differ by a multiple of that",
            )
