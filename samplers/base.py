"""What a sampler is: it sees a step of the rows that chose it and says which candidates to commit."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from samplers.canvas import Layout
from samplers.prediction import Statistic
from samplers.randomness import POSITIONS, uniform


class SamplerParams(BaseModel):
    """A sampler's parameters: its schema is documentation, its validation is what a request gets."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ParameterError(ValueError):
    """Parameters that do not fit the generation. `field` is the parameter's name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class SamplerError(RuntimeError):
    """A sampler or its input broke the contract; the generation it happened to cannot go on."""


@dataclass(frozen=True)
class Step:
    """One denoising step of the rows that share a sampler. Positions are relative to the generation region.

    All tensors are [rows, width], width being the longest generation region of the batch.

    Attributes:
        candidate: masked positions of the active block; nothing else may be committed.
        token: what would be committed.
        confidence: its probability; -inf where not a candidate.
        extra: further statistics that the sampler asked for; undefined where not a candidate.
        params: each row's own parameters.
        layouts: each row's canvas.
        seed, forward: [rows, 1], the row's seed and the number of forwards it took part in before this one.
        block, block_step, block_masks: [rows, 1], the active block, forwards already spent on it, and how many masks
            it had when it became active.
    """

    candidate: Tensor
    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    params: Sequence[SamplerParams]
    layouts: Sequence[Layout]
    seed: Tensor
    forward: Tensor
    block: Tensor
    block_step: Tensor
    block_masks: Tensor

    def param(self, name: str) -> Tensor:
        """A parameter of every row, [rows, 1]."""
        values = [getattr(p, name) for p in self.params]
        return torch.tensor(values, device=self.candidate.device)[:, None]

    def uniform(self) -> Tensor:
        """Random numbers in [0, 1) from each row's own stream, [rows, width]."""
        position = torch.arange(self.candidate.shape[1], device=self.candidate.device)
        return uniform(self.seed, self.forward, position, POSITIONS)


@dataclass(frozen=True)
class Selection:
    """What to do: `commit` is bool [rows, width], a subset of the candidates."""

    commit: Tensor


def best(score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
    """The `count` [rows, 1] candidates of highest score in each row; equal scores go to the lower position."""
    order = score.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return candidate & (rank < count)


class Sampler(ABC):
    """A stateless unmasking rule. Where it commits no candidate of a row, the loop commits the surest."""

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    Params: ClassVar[type[SamplerParams]] = SamplerParams

    @abstractmethod
    def select(self, step: Step) -> Selection:
        """Which candidates to commit. Must not change its input."""

    def check(self, params: SamplerParams, layout: Layout) -> None:
        """Raise ParameterError if the parameters do not fit this canvas."""
        return

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the sampler's docstring."""
        return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of the parameters."""
        return cls.Params.model_json_schema()
