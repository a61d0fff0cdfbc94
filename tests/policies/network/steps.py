"""Steps made by hand, with random predictions."""

from dataclasses import MISSING, fields, replace
from typing import Any

import torch
from torch import Tensor

from policies.network.config import PolicyConfig
from samplers import SamplerParams, Statistic, Step
from samplers.columns import Columns, LayoutColumns
from samplers.contract import CanvasReader


def random_step(config: PolicyConfig, lengths: list[int], share: float, seed: int = 0) -> Step[Any]:
    """Rows of these lengths of which a share is masked, told of what a policy of this configuration reads."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max(lengths)

    def column(values: Tensor | list[int]) -> Tensor:
        return torch.as_tensor(values)[:, None]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    position = torch.arange(width).expand(rows, width)
    inside = position < column(lengths)
    masked = (uniform(rows, width) < share) & inside
    masked[:, 0] = True
    known = inside if config.region else masked
    zero = torch.zeros(rows, 1, dtype=torch.int64)
    params = [SamplerParams()] * rows
    given: dict[str, Any] = {
        "candidate": masked,
        "masked": masked,
        "committed": inside & ~masked,
        "position": position,
        "seed": column(list(range(rows))),
        "forward": column(list(range(1, rows + 1))),
        "block_masks": column(lengths),
        "layout": LayoutColumns(
            *(column(lengths), zero, column(lengths), column(lengths), zero + 1, column(lengths), zero), zero > 0
        ),
        "params": params,
        "columns": Columns.of(params),
        "state": {},
        "canvas": CanvasReader(torch.zeros(rows, width, dtype=torch.int64), column(list(range(rows)))),
        "token": torch.randint(max(1, config.tokens), (rows, width), generator=generator).masked_fill(~known, -1),
        "confidence": uniform(rows, width).masked_fill(~known, -torch.inf),
        "extra": {name: uniform(rows, width).masked_fill(~known, torch.nan) for name in Statistic},
        "top": uniform(rows, width, config.largest).masked_fill(~known[..., None], torch.nan)
        if config.largest
        else None,
    }
    required = {each.name for each in fields(Step) if each.default is MISSING and each.default_factory is MISSING}
    return Step(**dict.fromkeys(required, zero) | given)


def row_of(step: Step[Any], row: int, length: int) -> Step[Any]:
    """One row of a step, alone and without padding."""
    layout = LayoutColumns(**{name: value[row : row + 1] for name, value in vars(step.layout).items()})
    tensors = {
        name: value for name, value in vars(step).items() if isinstance(value, torch.Tensor) and name != "canvas"
    }
    cut = {name: value[row : row + 1, :length] for name, value in tensors.items()}
    extra = {name: value[row : row + 1, :length] for name, value in step.extra.items()}
    params = step.params[row : row + 1]
    return replace(step, **cut, extra=extra, layout=layout, params=params, columns=Columns.of(params))
