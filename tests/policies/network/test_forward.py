"""The network's two forward passes against one that is written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policies.network import features, policy_network
from policies.network.observation import Observation, observe
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy, score, waves
from tests.policies.network.steps import random_step
from tests.policies.tiny import RICH, SMALL, network

CONFIGS: list[dict[str, Any]] = [
    {"region": False},
    RICH | {"region": False, "takes_speed": True},
    RICH | {"region": True, "tokens": 7, "heads": 1},
    RICH | {"region": False, "tokens": 7, "blocks": 2, "heads": 4, "takes_speed": True},
]
LENGTHS = [5, 24, 17, 24, 1]


def written_out(net: UnmaskingPolicy, seen: Observation, speed: Tensor | None) -> Tensor:
    """Logits with the condition of every position, and attention, spelled out."""
    x = net.stream(seen.features)
    if net.token is not None and seen.tokens is not None:
        x = x + net.token(seen.tokens.clamp(min=0)) * (seen.tokens >= 0)[..., None]
    condition = net.mask(seen.masked.long()) + net.time(waves(seen.time, net.config.time_period))[:, None]
    if speed is not None:
        condition = condition + net.speed(speed[:, None] * 2 - 1)[:, None]
    for block in net.blocks:
        scale1, shift1, gate1, scale2, shift2, gate2 = block.condition(condition).chunk(6, dim=-1)
        h = block.qkv(block.attention_norm(x) * (1 + scale1) + shift1)
        q, k, v = (y.unflatten(-1, (block.heads, -1)).transpose(1, 2) for y in h.chunk(3, dim=-1))
        scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~seen.valid[:, None, None], -torch.inf)
        x = x + (1 + gate1) * block.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(-2))
        h = block.feedforward_norm(x) * (1 + scale2) + shift2
        x = x + (1 + gate2) * block.down(F.gelu(block.up(h)))
    logits: Tensor = net.head(net.norm(x))[..., 0]
    return logits if speed is None else logits + net.push * (2 * speed[:, None] - 1)


def turned(x: Tensor) -> Tensor:
    """Rotary embedding, pair by pair."""
    size = x.shape[-1]
    angle = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
    return torch.stack(pairs, dim=-1).flatten(-2)


def case(config: dict[str, Any], share: float) -> tuple[UnmaskingPolicy, Any, Tensor | None]:
    net = network(**config)
    step = random_step(net.config, LENGTHS, share)
    return net, step, torch.linspace(0, 1, len(LENGTHS)) if net.config.takes_speed else None


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_those_of_the_definition(config: dict[str, Any], share: float) -> None:
    """In training, without gradients, and of candidates only; rows of different lengths."""
    net, step, speed = case(config, share)
    seen = observe(step, net.config)
    expected = written_out(net, seen, speed).detach()
    inside, candidate = seen.valid, step.candidate
    trained = score(net, seen, speed)
    assert trained.requires_grad
    torch.testing.assert_close(trained.detach()[inside], expected[inside], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(score(net, seen, speed)[inside], expected[inside], atol=1e-5, rtol=1e-5)
    found = LoadedPolicy(net).score(step, None if speed is None else speed[:, None])
    torch.testing.assert_close(found[candidate], expected[candidate], atol=1e-5, rtol=1e-5)
    assert (found[~candidate] == 0).all() and not found.requires_grad


@pytest.mark.parametrize("config", CONFIGS)
def test_an_accelerator_computes_all_positions_to_the_same_end(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, nobody waits for the number of candidates."""
    net, step, speed = case(config, 0.3)
    column = None if speed is None else speed[:, None]
    expected = LoadedPolicy(net).score(step, column)
    monkeypatch.setattr(policy_network, "some", lambda wanted: None)
    torch.testing.assert_close(LoadedPolicy(net).score(step, column), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_are_those_of_the_definition(config: dict[str, Any]) -> None:
    net, step, speed = case(config, 0.5)
    LoadedPolicy(net).score(step, None if speed is None else speed[:, None])  # what it keeps can be used in training
    seen = observe(step, net.config)
    found, expected = (
        torch.autograd.grad(logits[seen.valid].square().sum(), list(net.parameters()))
        for logits in (score(net, seen, speed), written_out(net, seen, speed))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("region", [True, False])
def test_features_of_some_places_are_those_of_all(region: bool) -> None:
    config = network(**RICH | {"region": region}).config
    step = random_step(config, LENGTHS, 0.5)
    places = torch.randperm(step.candidate.numel())[:35]
    some, every = (features.read(step, config.features, which) for which in (places, None))
    assert some.equal(every.flatten(0, 1)[places])
    assert every.isfinite().all() and (every[step.confidence == -torch.inf] == 0).all()


def test_a_policy_leaves_its_network_as_it_was() -> None:
    net = UnmaskingPolicy(network(**SMALL).config).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    LoadedPolicy(net).score(random_step(net.config, LENGTHS, 0.5), None)
    assert net.training and all(p.requires_grad and not p.is_inference() for p in net.parameters())
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())
