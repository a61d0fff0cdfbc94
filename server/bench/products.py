"""Bare matrix products of a forward: the attainable speed of the machine."""

from collections.abc import Callable

import torch
from torch import nn

from server.models.checkpoint.packing import pack_linear_layers
from server.models.families.llada import LLaDAConfig


def bare_products(
    config: LLaDAConfig, tokens: int, wanted: int, dtype: torch.dtype = torch.float32
) -> tuple[Callable[[], None], float]:
    """All products of one forward, through layers laid out like the model's, and their floating-point operations.

    Args:
        tokens: number of tokens in the forward.
        wanted: number of tokens that the last layer and the head compute.
    """
    d, m = config.d_model, config.mlp_width
    each = [(tokens, d, d)] * 4 + [(tokens, d, m)] * 2 + [(tokens, m, d)]
    last = [(tokens, d, d)] * 2 + [(wanted, n, k) for _, n, k in each[2:]]
    shapes = each * (config.n_layers - 1) + last + [(wanted, d, config.rows)]
    layers = nn.ModuleDict({f"{n}x{k}": nn.Linear(n, k, bias=False, dtype=dtype) for _, n, k in set(shapes)})
    layers.requires_grad_(False)
    pack_linear_layers(layers)
    inputs = {(rows, n): torch.randn(rows, n, dtype=dtype) for rows, n, _ in shapes}

    def bare() -> None:
        with torch.inference_mode():
            for rows, n, k in shapes:
                layers[f"{n}x{k}"](inputs[rows, n])

    return bare, 2.0 * sum(rows * n * k for rows, n, k in shapes)
