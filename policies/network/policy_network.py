"""The policy network: one adaLN transformer block over numbers per position, mask bits and time."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.network import features
from policies.network.adaptive_block import AdaptiveBlock
from policies.network.config import PolicyConfig
from policies.network.linear import linear
from policies.network.lines import Lines, some
from policies.network.observation import Observation, observe
from samplers import Statistic, Step
from samplers.loop.masks import anywhere

TIME_WIDTH = 128


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
        conditions, lines = self._conditions(time, speed), Lines.every(masked, valid)
        for block in self.blocks:
            x = block(x, conditions, lines)
        return self._with_speed(self._logits(x), speed)

    def score_some(self, seen: Observation, wanted: Tensor | None, speed: Tensor | None = None) -> Tensor:
        """Logits of masked positions, float32 [rows, width]; those of others come out wrong.

        Where an observation has places, the inputs of all other positions differ in their mask bit only: their keys
        and values are computed once for each bit.

        Args:
            wanted: int64 [n], masked positions among those of all rows whose logits are needed; None: all.
        """
        # On an accelerator, waiting for the answer takes longer than masking what needs no mask.
        valid = None if seen.valid.device.type == "cpu" and not anywhere(~seen.valid) else seen.valid
        every = lines = Lines.every(seen.masked, valid)
        conditions, x = self._conditions(seen.time, speed), self._stream(seen.features, seen.tokens)
        *first, last = self.blocks
        if seen.places is not None:
            lines = Lines.known(seen.masked, valid, seen.places)
            x = torch.cat([self.stream.bias.expand(2 * len(seen.masked), -1), x])
            if first and lines.holds is not None:  # from the second block on, positions differ in more
                x, lines = F.embedding(lines.holds, x).view(*every.shape, -1), every
        for block in first:
            x = block(x, conditions, lines)
        logits = self._logits(last(x, conditions, lines.asking(wanted)))
        if wanted is not None:
            logits = logits.new_zeros(seen.masked.numel()).index_copy_(0, wanted, logits)
        return self._with_speed(logits.view(seen.masked.shape), speed)

    def _stream(self, features: Tensor, tokens: Tensor | None) -> Tensor:
        x: Tensor = linear(features, self.stream.weight, self.stream.bias)
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

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x))[..., 0]
        return logits

    def _with_speed(self, logits: Tensor, speed: Tensor | None) -> Tensor:
        return logits + self.pushed(speed) if self.config.takes_speed and speed is not None else logits

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
        known = some(step.confidence > -torch.inf)
        seen = observe(step, self.network.config, known)
        logits = self.network.score_some(seen, some(step.candidate), None if speed is None else speed[:, 0])
        return logits.masked_fill_(~step.candidate, 0.0)


def score(network: UnmaskingPolicy, seen: Observation, speed: Tensor | None) -> Tensor:
    """Logits of an observation, [rows, width]."""
    logits: Tensor = network(seen.features, seen.masked, seen.valid, seen.time, speed, seen.tokens)
    return logits


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
