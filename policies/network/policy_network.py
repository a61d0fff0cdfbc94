"""The policy network: one adaLN transformer block over numbers per position, mask bits and time."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.network import features
from policies.network.adaptive_block import AdaptiveBlock
from policies.network.config import PolicyConfig
from policies.network.observation import Observation, observe
from samplers import Statistic, Step

TIME_WIDTH = 128

FEW = 0.75
"""Share of the positions up to which computing only the wanted ones pays."""


class UnmaskingPolicy(nn.Module):
    """Logits of committing each position. The prompt is not an input; tokens are if the configuration says so."""

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
        """Logits, float32 [rows, width].

        Args:
            features: float32 [rows, width, numbers].
            masked, valid: bool [rows, width], positions that are still masked, and those of the generation region.
            time: [rows], forwards used / length of the generation region.
            speed: [rows] in 0..1, for a policy that takes one.
            tokens: int64 [rows, width], predicted tokens, for a policy that reads them; -1 if unknown.
        """
        x = self._stream(features, tokens)
        conditions, which = self._conditions(time, speed), _condition_of(masked)
        for block in self.blocks:
            x = block(x, which, conditions, valid)
        return self._logits(x, speed)

    def score_masked(self, seen: Observation, wanted: Tensor | None, speed: Tensor | None = None) -> Tensor:
        """Logits of masked positions, float32 [rows, n]; those of committed positions come out wrong.

        Where an observation has columns, the inputs of all other positions differ in their mask bit only: their keys
        and values are computed once for each bit.

        Args:
            wanted: int64 [rows, n], positions whose logits are needed; None: all.
        """
        rows, width = seen.masked.shape
        conditions, which = self._conditions(seen.time, speed), _condition_of(seen.masked)
        x, holds = self._stream(seen.features, seen.tokens), None
        if seen.columns is not None:
            x, holds = self._with_unknown(x, seen.masked, seen.columns)
            if len(self.blocks) > 1:  # from the second block on, positions differ in more
                x, holds = F.embedding(holds, x.flatten(0, 1)), None
            else:
                unknown = torch.arange(2 * rows, device=x.device).view(rows, 2)
                which = torch.cat([unknown, which.gather(1, seen.columns)], dim=1)
        lines = None
        if wanted is not None:
            each = torch.arange(0, rows * width, width, device=x.device)[:, None]
            lines = wanted + each if holds is None else holds.gather(1, wanted)
        # On an accelerator, waiting for the answer takes longer than masking what needs no mask.
        valid = None if seen.valid.device.type == "cpu" and bool(seen.valid.all()) else seen.valid
        *first, last = self.blocks
        for block in first:
            x = block(x, which, conditions, valid)
        x = last(x, which, conditions, valid, holds, wanted, lines, second_only=True)
        return self._logits(x, speed)

    def _with_unknown(self, x: Tensor, masked: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Two more lines before those of the columns, of an unknown committed and an unknown masked position.

        Returns:
            the lines, [rows, 2 + columns, hidden], and the number of each position's, int64 [rows, width].
        """
        rows, count = len(x), 2 + x.shape[1]
        number = torch.arange(rows * count, device=x.device).view(rows, count)
        lines = torch.cat([self.stream.bias.expand(rows, 2, -1), x], dim=1)
        return lines, (masked + number[:, :1]).scatter_(1, columns, number[:, 2:])

    def _stream(self, features: Tensor, tokens: Tensor | None) -> Tensor:
        x: Tensor = self.stream(features)
        if self.token is None:
            return x
        if tokens is None:
            raise ValueError("this policy reads tokens")
        x = x + self.token(tokens.clamp(min=0)) * (tokens >= 0)[..., None]
        return x

    def _conditions(self, time: Tensor, speed: Tensor | None) -> Tensor:
        """The two conditions of each row, of committed and of masked positions, [2 * rows, hidden]."""
        condition: Tensor = self.time(waves(time, self.config.time_period))
        if self.config.takes_speed:
            if speed is None:
                raise ValueError("this policy takes a speed")
            condition = condition + self.speed(speed[:, None] * 2 - 1)
        return (condition[:, None] + self.mask.weight).flatten(0, 1)

    def _logits(self, x: Tensor, speed: Tensor | None) -> Tensor:
        logits: Tensor = self.head(self.norm(x))[..., 0]
        if self.config.takes_speed and speed is not None:
            logits = logits + self.pushed(speed)
        return logits

    def pushed(self, speed: Tensor) -> Tensor:
        """The addition of a speed to every logit, [rows, 1]: from the first update on, more speed means bolder."""
        return self.push * (2 * speed[:, None] - 1)


class LoadedPolicy:
    """A network as the policy sampler uses it, without gradients. The network stays as it is, on its device.

    Args:
        longest: largest number of positions in its training.
    """

    def __init__(self, network: UnmaskingPolicy, longest: int = 1 << 40) -> None:
        config = network.config
        self.network = network
        self.statistics: frozenset[Statistic] = features.statistics(config.features)
        self.top = config.largest
        self.whole_region = config.region
        self.action = config.action
        self.stop_logit = config.stop_logit
        self.takes_speed = config.takes_speed
        self.temperature = config.temperature
        self.floor = config.floor
        self.longest = longest

    @torch.inference_mode()
    def score(self, step: Step, speed: Tensor | None) -> Tensor:
        """Logits of the candidates, and 0 elsewhere: float32 [rows, width]."""
        columns = _columns(step.confidence > -torch.inf)
        wanted = _columns(step.candidate) if columns is None else columns
        seen = observe(step, self.network.config, columns)
        logits = self.network.score_masked(seen, wanted, None if speed is None else speed[:, 0])
        if wanted is not None:
            logits = torch.zeros_like(step.confidence).scatter_(1, wanted, logits)
        return logits.masked_fill_(~step.candidate, 0.0)


def score(network: UnmaskingPolicy, seen: Observation, speed: Tensor | None) -> Tensor:
    """Logits of an observation, [rows, width]."""
    logits: Tensor = network(seen.features, seen.masked, seen.valid, seen.time, speed, seen.tokens)
    return logits


def _condition_of(masked: Tensor) -> Tensor:
    """The condition of each position among those of all rows, int64 [rows, width]."""
    return masked + torch.arange(0, 2 * len(masked), 2, device=masked.device)[:, None]


def _columns(wanted: Tensor) -> Tensor | None:
    """Columns of the wanted positions of each row, int64 [rows, n], filled up with others; None: all columns.

    Only on the CPU: elsewhere to wait for their number takes longer than to compute the others.
    """
    if wanted.device.type != "cpu":
        return None
    most = max(1, int(wanted.sum(dim=1).max()))
    if most > FEW * wanted.shape[1]:
        return None
    return wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]


@lru_cache(maxsize=64)
def _frequencies(period: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what inference mode makes could not be used in training
        exponent = torch.arange(TIME_WIDTH // 2, dtype=torch.float32, device=device) / (TIME_WIDTH // 2 - 1)
        return period**exponent


def waves(time: Tensor, period: float) -> Tensor:
    """Cosines and sines of [rows] times, [rows, 128]: frequencies from 1 to `period`, evenly spaced in logs."""
    angle = time.float()[:, None] * _frequencies(period, time.device)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def parameters(network: nn.Module) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in network.parameters())
