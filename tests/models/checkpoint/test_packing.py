"""Layers laid out for the processor: the same products, and nothing else changes."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from server.models.checkpoint.packing import PackedLinear, pack_linear_layers
from server.models.families.llada import LLaDA, LLaDAConfig
from tests.tiny import tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_is_the_plain_one(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias, dtype=dtype)
    with torch.inference_mode():
        packed = PackedLinear(plain)
        for rows in (1, 7, 64, 7):
            x = torch.randn(rows, 48, dtype=dtype)
            exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
            found = packed(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-2)
            assert packed(x[None])[0].equal(found)


@pytest.mark.parametrize("weight_tying", [False, True])
def test_a_network_says_the_same(weight_tying: bool) -> None:
    torch.manual_seed(0)
    plain = LLaDA(LLaDAConfig.model_validate(tiny_config(64, weight_tying=weight_tying))).requires_grad_(False)
    packed = deepcopy(plain)
    pack_linear_layers(packed)
    left = [name for name, module in packed.named_modules() if type(module) is nn.Linear]
    assert left == [] and isinstance(packed, LLaDA)
    tokens = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        assert torch.allclose(packed(tokens), plain(tokens), atol=1e-5)
