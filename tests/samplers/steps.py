"""Steps that are made up, for rules on worked examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers import Layout, Modifier, Sampler, SamplerParams, Statistic, Step
from samplers.columns import Columns, LayoutColumns
from samplers.contract import CanvasReader


def step_of(
    owner: Sampler | Modifier,
    params: Sequence[SamplerParams],
    confidence: Tensor,
    candidate: Tensor | None = None,
    *,
    layout: Layout | None = None,
    token: Tensor | None = None,
    committed: Tensor | None = None,
    current: Tensor | None = None,
    extra: Mapping[Statistic, Tensor] | None = None,
    state: Mapping[str, Tensor] | None = None,
    seed: Tensor | None = None,
    block_masks: int | None = None,
    **more: Any,
) -> Step:
    """A first step of rows that are one block each, [rows, width], without a prompt.

    Args:
        current: what is on the canvas; token 0 if nothing is said.
        state: what the rule has kept, instead of what it begins with.
    """
    rows, width = confidence.shape
    candidate = torch.ones_like(confidence, dtype=torch.bool) if candidate is None else candidate
    layout = layout or Layout(0, width, width)
    zero = torch.zeros(rows, 1, dtype=torch.int64)
    kept = {
        name: torch.full((rows, width if spec.per == "position" else 1, *spec.shape), spec.fill, dtype=spec.dtype)
        for name, spec in owner.state.items()
    }
    masks = candidate.sum(dim=1, keepdim=True) if block_masks is None else zero + block_masks
    return Step(
        candidate=candidate,
        masked=candidate,
        committed=torch.zeros_like(candidate) if committed is None else committed,
        position=torch.arange(width).expand(rows, width),
        seed=zero if seed is None else seed,
        forward=zero,
        block=zero,
        block_start=zero,
        block_step=zero,
        block_masks=masks,
        slot=zero,
        layout=columns_of_layout(layout, rows),
        params=list(params),
        columns=Columns.of(params),
        state={**kept, **(state or {})},
        canvas=CanvasReader(
            torch.zeros(rows, layout.length, dtype=torch.int64) if current is None else current,
            torch.arange(rows)[:, None],
        ),
        token=torch.ones(rows, width, dtype=torch.int64) if token is None else token,
        confidence=confidence.masked_fill(~(candidate if committed is None else candidate | committed), -torch.inf),
        extra=dict(extra or {}),
        **more,
    )


def columns_of_layout(layout: Layout, rows: int) -> LayoutColumns:
    """The same layout for each of some rows."""

    def column(value: int) -> Tensor:
        return torch.full((rows, 1), value)

    names = ("length", "prompt_length", "gen_length", "block_length", "blocks", "denoised_length")
    return LayoutColumns(
        **{name: column(getattr(layout, name)) for name in names},
        noise=column(layout.pattern.noise or 0),
        strict=torch.full((rows, 1), layout.pattern.strict),
    )
