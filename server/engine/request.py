"""Inputs and outputs of the engine: plain data, no tensors, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from samplers import CacheMode, Modifier, Sampler, SamplerParams, TokenChoice
from samplers.loop.event import StepEvent


class FinishReason(StrEnum):
    """Reason for the end of a generation. Also the closed set of a metric's label."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


class StopCheck(Protocol):
    """Search of a growing text for its stop."""

    def add(self, tokens: Sequence[int], last: bool = False) -> int | None:
        """Number of tokens of the text up to the one that completes a stop; None if there is no stop yet.

        Args:
            tokens: the new tokens.
            last: True if the text ends with them.
        """


@dataclass(frozen=True)
class Owner:
    """Owner of a generation. Names are opaque and reveal nothing that a client could keep secret.

    Attributes:
        name: owners of a group share equally in what the group gets.
        group: groups share equally, and each has the limits of `Quota`.
        ahead: True if priorities also count against other owners, and no quota applies.
    """

    name: str = ""
    group: str = ""
    ahead: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One validated generation.

    Attributes:
        prompt, suffix: token ids before and after the generation region.
        max_tokens: maximum length of the text. A block-causal model denoises the rest of the last block too.
        sampler, params: the unmasking rule, bound to its auxiliaries, and its parameters.
        name: name of the sampler in metrics and logs.
        modifiers: modifiers around the rule with their parameters, in order.
        block_length: positions denoised together; None is full diffusion.
        choice, seed: token choice, and random stream of the generation.
        end_ids: tokens that end the text; empty: denoise the whole region.
        stop: called after every forward, on the engine's thread; belongs to this generation alone.
        fill_after_end: settle everything after an end-of-text at once.
        cache: cache mode of the generation's blocks.
        timeout: seconds from submission until it is ended; None: no limit.
        counts_prompt: False if another generation of the same request has the same prompt.
        priority: smaller values are admitted first, among the owner's own generations.
        owner: owner whose share and quota are charged.
    """

    prompt: list[int]
    max_tokens: int
    sampler: Sampler[Any]
    params: SamplerParams
    name: str = ""
    modifiers: Sequence[tuple[Modifier[Any], SamplerParams]] = ()
    suffix: list[int] = field(default_factory=list)
    block_length: int | None = None
    choice: TokenChoice = field(default_factory=TokenChoice)
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    stop: StopCheck | None = None
    fill_after_end: bool = True
    cache: CacheMode = CacheMode.NONE
    timeout: float | None = None
    counts_prompt: bool = True
    priority: int = 0
    owner: Owner = field(default_factory=Owner)


@dataclass(frozen=True)
class Finished:
    """End of a generation. `completion_tokens` counts up to and including the first end-of-text or the stop."""

    reason: FinishReason
    completion_tokens: int
    forwards: int
    message: str = ""


Event = StepEvent | Finished


class EngineError(Exception):
    """Refusal of a request, or inability to serve it."""


class RequestError(EngineError):
    """A request that cannot be served as it is. `field` names the field to change, `code` the kind of error."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


@dataclass(frozen=True)
class Budget:
    """Remaining tokens per minute of a group. `reset`: seconds until it has all of them again."""

    limit: int
    remaining: int
    reset: float


class QueueFullError(EngineError):
    """The waiting queue is full; a later attempt may succeed."""


class KeyLimitError(EngineError):
    """A group of owners has reached its quota.

    Attributes:
        limit: name of the exceeded limit.
        wait: seconds until there may be room; inf: never.
        budget: remaining tokens, if these are limited.
    """

    def __init__(self, limit: str, message: str, wait: float, budget: Budget | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.wait = wait
        self.budget = budget


class NotServingError(EngineError):
    """The engine is draining, stopped or dead."""
