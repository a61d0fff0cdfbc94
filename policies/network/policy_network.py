"""The policy network: one adaLN transformer block over numbers per position, mask bits and time."""

import math

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from policies.network import features
from policies.network.features import Feature
from samplers import Statistic, Step
from samplers.learned.policy import Action

TIME_WIDTH = 128


class PolicyConfig(BaseModel):
    """Shape and inputs of a policy. Defaults are the paper's (arXiv 2512.09106, 3.2, appendix H), but for the time.

    Attributes:
        features: what it reads per position (see `policies.network.features`); `top` is how many of the largest
            probabilities.
        tokens: size of the vocabulary whose predicted tokens it reads through an embedding of its own; 0: it does not.
            Such a policy serves no model with another tokenizer.
        region: whether it reads the whole generation region, or candidates only, which is less work for the model.
        time_period: times are given as cosines and sines of frequencies from 1 to this. The paper's code has 1, so that
            all frequencies are the same.
        blocks: transformer blocks.
        output_bias: where the logits start: -2 commits about one position in eight.
        takes_speed: whether it is told how fast to go, from 0 to 1.
        temperature, floor: what holds at serving where a request says nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...] = Field(("confidence",), min_length=1)
    top: int = Field(1, ge=1, le=64)
    tokens: int = Field(0, ge=0, le=1_000_000)
    region: bool = True
    hidden: int = Field(128, ge=4, le=1024)
    heads: int = Field(2, ge=1, le=32)
    feedforward: int = Field(512, ge=4, le=8192)
    blocks: int = Field(1, ge=1, le=8)
    time_period: float = Field(100.0, ge=1, le=1e6)
    output_bias: float = Field(-2.0, ge=-20, le=20)
    action: Action = "bernoulli"
    stop_logit: float = Field(0.0, ge=-100, le=100)
    takes_speed: bool = False
    temperature: float = Field(1.0, ge=0, le=100)
    floor: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "PolicyConfig":
        if len(set(self.features)) < len(self.features):
            raise ValueError("a feature is named twice")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden = {self.hidden} does not divide into {self.heads} heads of even size")
        if "top_logs" in self.features and self.top < 2:
            raise ValueError("top_logs needs a top of at least 2")
        return self

    @property
    def numbers(self) -> int:
        """Numbers per position."""
        return sum(features.width(feature, self.top) for feature in self.features)

    @property
    def largest(self) -> int:
        """How many of the largest probabilities the model has to give."""
        return self.top if {"top", "top_logs"} & set(self.features) else 0


class AdaptiveBlock(nn.Module):
    """A DiT block whose norms and gates follow a condition per position; gates start at 1."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.condition = nn.Linear(hidden, 6 * hidden)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, config.feedforward), nn.Linear(config.feedforward, hidden)

    def forward(self, x: Tensor, condition: Tensor, valid: Tensor) -> Tensor:
        rows, length, hidden = x.shape
        scale1, shift1, gate1, scale2, shift2, gate2 = self.condition(condition).chunk(6, dim=-1)
        h = self.attention_norm(x) * (1 + scale1) + shift1
        q, k, v = (y.view(rows, length, self.heads, -1).transpose(1, 2) for y in self.qkv(h).chunk(3, dim=-1))
        q, k = rotate_pairs(q), rotate_pairs(k)
        # Written out: the backward pass of the fused CPU kernel is much slower than this.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~valid[:, None, None], torch.finfo(x.dtype).min).softmax(dim=-1) @ v
        x = x + (1 + gate1) * self.out(mixed.transpose(1, 2).reshape(rows, length, hidden))
        h = self.feedforward_norm(x) * (1 + scale2) + shift2
        out: Tensor = x + (1 + gate2) * self.down(F.gelu(self.up(h)))
        return out


class UnmaskingPolicy(nn.Module):
    """Logits of committing each position. It reads no prompt, and tokens only if its configuration says so."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.stream = nn.Linear(config.numbers, hidden)
        self.token = nn.Embedding(config.tokens, hidden) if config.tokens else None
        if self.token is not None:
            nn.init.normal_(self.token.weight, std=0.3)
        self.mask = nn.Embedding(2, hidden)
        self.time = nn.Sequential(nn.Linear(TIME_WIDTH, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.speed = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.push = nn.Parameter(torch.tensor(3.0))
        if not config.takes_speed:
            del self.speed, self.push
        self.blocks = nn.ModuleList(AdaptiveBlock(config) for _ in range(config.blocks))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        nn.init.constant_(self.head.bias, config.output_bias)

    def forward(
        self,
        features: Tensor,
        masked: Tensor,
        valid: Tensor,
        time: Tensor,
        speed: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Logits, float32 [rows, length].

        Args:
            features: float32 [rows, length, numbers].
            masked, valid: bool [rows, length]: still masked; part of the row's generation region.
            time: [rows], forwards used / length of the generation region.
            speed: [rows] in 0..1, for a policy that takes it.
            tokens: int64 [rows, length], what the model would put there, for a policy that reads it.
        """
        condition = self.mask(masked.long()) + self.time(waves(time, self.config.time_period))[:, None]
        x = self.stream(features)
        if self.token is not None:
            if tokens is None:
                raise ValueError("this policy reads tokens")
            x = x + self.token(tokens.clamp(min=0)) * (tokens >= 0)[..., None]
        if self.config.takes_speed:
            if speed is None:
                raise ValueError("this policy takes a speed")
            condition = condition + self.speed(speed[:, None] * 2 - 1)[:, None]
        for block in self.blocks:
            x = block(x, condition, valid)
        logits: Tensor = self.head(self.norm(x))[..., 0]
        if self.config.takes_speed and speed is not None:
            logits = logits + self.pushed(speed)
        return logits

    def pushed(self, speed: Tensor) -> Tensor:
        """What a speed adds to every logit, [rows, 1]: from the first update on, more speed means bolder."""
        return self.push * (2 * speed[:, None] - 1)


class LoadedPolicy:
    """A network as the policy sampler uses it: no gradients, on the step's device.

    Args:
        longest: most positions that it saw in training.
    """

    def __init__(self, network: UnmaskingPolicy, longest: int = 1 << 40) -> None:
        config = network.config
        self.network = network.eval().requires_grad_(False)
        self.statistics: frozenset[Statistic] = features.statistics(config.features)
        self.top = config.largest
        self.region = config.region
        self.action = config.action
        self.stop_logit = config.stop_logit
        self.takes_speed = config.takes_speed
        self.temperature = config.temperature
        self.floor = config.floor
        self.longest = longest

    @torch.inference_mode()
    def score(self, step: Step, speed: Tensor | None) -> Tensor:
        return score(self.network, observe(step, self.network.config), None if speed is None else speed[:, 0])


class Observation:
    """What a policy sees of some rows: the arguments of `UnmaskingPolicy.forward`."""

    def __init__(self, features: Tensor, masked: Tensor, valid: Tensor, time: Tensor, tokens: Tensor | None) -> None:
        self.features = features
        self.masked = masked
        self.valid = valid
        self.time = time
        self.tokens = tokens

    def __getitem__(self, rows: Tensor) -> "Observation":
        tokens = None if self.tokens is None else self.tokens[rows]
        return Observation(self.features[rows], self.masked[rows], self.valid[rows], self.time[rows], tokens)


def observe(step: Step, config: PolicyConfig) -> Observation:
    """A step as a policy of this configuration sees it."""
    lengths = step.layout.gen_length
    valid = step.position < lengths
    return Observation(
        features=features.read(step, config.features),
        masked=step.masked,
        valid=valid,
        time=(step.forward / lengths)[:, 0],
        tokens=step.token if config.tokens else None,
    )


def score(network: UnmaskingPolicy, seen: Observation, speed: Tensor | None) -> Tensor:
    """Logits of an observation, [rows, length]."""
    logits: Tensor = network(seen.features, seen.masked, seen.valid, seen.time, speed, seen.tokens)
    return logits


def waves(time: Tensor, period: float) -> Tensor:
    """Cosines and sines of [rows] times, [rows, 128]: frequencies from 1 to `period`, evenly spaced in logs."""
    half = TIME_WIDTH // 2
    exponent = torch.arange(half, dtype=torch.float32, device=time.device) / (half - 1)
    angle = time.float()[:, None] * period**exponent
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def rotate_pairs(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of neighbouring pairs, [rows, heads, length, size], positions from 0."""
    length, size = x.shape[-2:]
    inverse = base ** (-torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angle = torch.arange(length, dtype=torch.float32, device=x.device)[:, None] * inverse
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in network.parameters())
