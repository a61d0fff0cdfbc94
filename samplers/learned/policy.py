"""Decisions of a trained network."""

import math
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from samplers.canvas import Layout
from samplers.contract import ParameterError, Resources, Sampler, SamplerError, SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.randomness import FIRST, LATER, uniform
from samplers.ranking import surest

Action = Literal["bernoulli", "dpls"]
STOP = -1
"""End marker in an order of draws."""


class PolicyNetwork(Protocol):
    """Interface of a loaded policy. `temperature` and `floor` are defaults for requests that set none.

    Attributes:
        statistics, top, whole_region: inputs of the network (see `Sampler`).
        action: method of turning logits into a set of positions.
        stop_logit: logit of ending the draws; dpls only.
        takes_speed: True if the network was trained with a speed as input.
        longest: maximum number of positions seen in training.
    """

    statistics: frozenset[Statistic]
    top: int
    whole_region: bool
    action: Action
    stop_logit: float
    takes_speed: bool
    temperature: float
    floor: float
    longest: int

    def score(self, step: Step[Any], speed: Tensor | None) -> Tensor:
        """Logits, float32 [rows, width]. `speed` is [rows, 1] in 0..1 for networks that take it."""


class PolicyParams(SamplerParams):
    policy: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="name of a loaded policy; may be left out where there is only one",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        description="commit with probability sigmoid(logit / temperature); 0: commit where the logit is at least 0; "
        "without it, what the policy's card says",
    )
    beta: float = Field(
        1.0, gt=0, le=1000, description="factor on the probabilities, at most 1 each: above 1 is faster"
    )
    cut: float | None = Field(
        None, gt=0, lt=1, description="commit where sigmoid(logit) is at least this, and draw nothing"
    )
    speed: float | None = Field(
        None, ge=0, le=1, description="0 (careful) to 1 (fast), for policies that were trained to be told (default 0.5)"
    )
    floor: float | None = Field(
        None,
        ge=0,
        le=1,
        description="never commit below this confidence, save the one a forward needs; without it, the policy's own",
    )


class Policy(Sampler[PolicyParams]):
    """Commit what a policy trained by reinforcement learning decides on, and always its surest candidate.

    Jazbec et al., Learning Unmasking Policies for Diffusion Language Models, arXiv 2512.09106, section 3.2.
    """

    name = "policy"
    paper = "https://arxiv.org/abs/2512.09106"
    requires = {"policy": "policy"}
    sees_region = True
    Params = PolicyParams

    def __init__(self, network: PolicyNetwork | None = None) -> None:
        self.network = network
        if network is not None:
            self.statistics, self.top, self.whole_region = network.statistics, network.top, network.whole_region

    def bind(self, resources: Resources, params: PolicyParams) -> "Policy":
        if self.network is not None:
            return self
        found: Policy = resources.find("policy", params.policy)
        return found

    def check(self, params: PolicyParams, layout: Layout) -> None:
        if self.network is None:
            raise ParameterError("policy", "no policy is loaded")
        if params.speed is not None and not self.network.takes_speed:
            raise ParameterError("speed", "this policy was not trained to be told a speed; leave speed out")
        if params.cut is not None and params.temperature is not None:
            raise ParameterError("cut", "give cut or temperature, not both")
        if self.network.action == "dpls":
            for field, given in (("cut", params.cut is not None), ("beta", params.beta != 1.0)):
                if given:
                    raise ParameterError(field, f"{field} is for policies with bernoulli actions; this one draws dpls")

    def select(self, step: Step[PolicyParams]) -> Selection:
        network = self.network
        if network is None:
            raise SamplerError("no policy is loaded")
        whole, step, columns = step, *nearby(step, network.longest)
        speed = step.param("speed", none=0.5) if network.takes_speed else None
        logits = network.score(step, speed)
        if not bool((logits.isfinite() | ~step.candidate).all()):
            raise SamplerError("the policy's output is not finite")
        temperature = step.param("temperature", none=network.temperature)
        if network.action == "dpls":
            gumbel = step_gumbel(step) * (temperature > 0)[..., None]
            scaled = logits / temperature.where(temperature > 0, 1.0)
            _, action = dpls_draw(scaled, step.candidate, gumbel, network.stop_logit)
        else:
            action = self._bits(step, logits, temperature)
        action = action & (step.confidence >= step.param("floor", none=network.floor))
        action = commit_at_least_one(action, logits, step.candidate)
        if columns is None:
            return Selection(action)
        found = torch.zeros_like(whole.candidate, dtype=torch.int64).scatter_add(1, columns, action.long())
        return Selection((found > 0) & whole.candidate)

    def _bits(self, step: Step[PolicyParams], logits: Tensor, temperature: Tensor) -> Tensor:
        """Independent decisions: drawn at a temperature, otherwise cut at a probability."""
        fixed = (temperature == 0) | step.given("cut")
        beta, cut = step.param("beta"), step.param("cut", none=0.5)
        certain = step.candidate & ((torch.sigmoid(logits) * beta).clamp(max=1.0) >= cut)
        if bool(fixed.all()):
            return certain
        drawn = bernoulli_draw(logits, step.candidate, step.uniform(), temperature.where(~fixed, 1.0), beta)
        return drawn.where(~fixed, certain)


def nearby(step: Step[PolicyParams], longest: int) -> tuple[Step[PolicyParams], Tensor | None]:
    """A step over at most `longest` positions per row, the active block included, and their columns; None: all of them.

    In block decoding of a long region, the policy sees no more positions than in training: half of the rest before the
    block and half after it. A longer block is seen as a whole.
    """
    gen, block = step.layout.gen_length, step.layout.block_length
    own, size = step.columns.keep("nearby", lambda: _sizes(gen, block, longest))
    if size is None:
        return step, None
    first = (step.block_start - (own - block) // 2).clamp(min=0).minimum(gen - own)
    offset = torch.arange(size, device=first.device)
    columns = (first + offset).clamp(max=step.candidate.shape[1] - 1)

    def near(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        at = columns.view(*columns.shape, *[1] * (values.dim() - 2)).expand(*columns.shape, *values.shape[2:])
        return values.gather(1, at)

    names = ("masked", "committed", "token", "confidence", "top", "named", "probability")
    changes: dict[str, Any] = {name: near(getattr(step, name)) for name in names}
    changes["extra"] = {name: near(values) for name, values in step.extra.items()}
    there = offset < own  # the number of visible positions differs between rows
    position = step.position.gather(1, columns).where(there, gen)
    return replace(step, **changes, position=position, candidate=there & near(step.candidate)), columns


def _sizes(gen: Tensor, block: Tensor, longest: int) -> tuple[Tensor, int | None]:
    """Number of positions that each row sees, int64 [rows, 1], and their maximum; None if all rows see whole
    regions."""
    own = block.clamp(min=longest).minimum(gen)
    return own, None if bool((own == gen).all()) else int(own.max())


def step_gumbel(step: Step[Any]) -> Tensor:
    """Gumbel noise from each row's own stream, [rows, 2, width + 1]: for the first draw, and for all later ones."""
    # Numbered by position, STOP as -1, so that the noise does not depend on the width of the batch.
    place = torch.nn.functional.pad(step.position, (0, 1), value=STOP)
    numbers = torch.stack([uniform(step.seed, step.forward, place, stream) for stream in (FIRST, LATER)], dim=1)
    return (-(-numbers.clamp(min=2.0**-53).log()).log()).float()


def bernoulli_draw(
    logits: Tensor, candidates: Tensor, uniform: Tensor, temperature: Tensor | float = 1.0, scale: Tensor | float = 1.0
) -> Tensor:
    """Independent draws: each candidate with probability min(1, scale * sigmoid(logit / temperature)).

    Args:
        logits: [..., width].
        candidates: bool [..., width]; nothing else is drawn.
        uniform: numbers in [0, 1), [..., width].
        temperature, scale: `tau` and `beta` of the paper (section 3.2), broadcastable.
    """
    return candidates & (uniform < scale * torch.sigmoid(logits / temperature))


def commit_at_least_one(action: Tensor, logits: Tensor, candidates: Tensor) -> Tensor:
    """The action; in rows where it is empty, the candidate of largest logit (paper, algorithm 1)."""
    empty = ~action.any(dim=-1, keepdim=True)
    width = action.shape[-1]
    found = surest(logits.reshape(-1, width), candidates.reshape(-1, width)).view(action.shape)
    return action | (found & empty)


def dpls_draw(logits: Tensor, candidates: Tensor, gumbel: Tensor, stop_logit: float = 0.0) -> tuple[Tensor, Tensor]:
    """Dynamic Plackett-Luce: draw positions one by one until STOP is drawn (paper, appendix E).

    The first draw excludes STOP, so the action is not empty if there is a candidate. Drawing without replacement is
    sorting by logit + Gumbel noise.

    Args:
        logits, candidates: [..., width].
        gumbel: [..., 2, width + 1]; the first row for the first draw, the second for later ones, STOP last.

    Returns:
        order int64 [..., width], the positions as drawn and then STOP (-1), and the action, bool [..., width].
    """
    masked = logits.masked_fill(~candidates, -math.inf)
    some = candidates.any(dim=-1, keepdim=True)
    first = (masked + gumbel[..., 0, :-1]).argmax(dim=-1, keepdim=True)
    left = candidates.scatter(-1, first, False)
    score = (logits + gumbel[..., 1, :-1]).masked_fill(~left, -math.inf)
    stop = stop_logit + gumbel[..., 1, -1:]
    ranked, place = score.sort(dim=-1, descending=True, stable=True)
    later = place.masked_fill(~(ranked > stop), STOP)
    order = torch.cat([first, later[..., :-1]], dim=-1).masked_fill(~some, STOP)
    action = (score > stop).scatter(-1, first, True) & candidates
    return order, action
