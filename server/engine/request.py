"""What goes into the engine and what comes out of it: plain data, no tensors, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from samplers import CacheMode, Modifier, Sampler, SamplerParams, TokenChoice
from samplers.loop.event import StepEvent


class FinishReason(StrEnum):
    """Why a generation ended. Also the closed set of a metric's label."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    TIMEOUT = "timeout"
    ERROR = "error"


class StopCheck(Protocol):
    """Finds out where a growing text is to stop."""

    def add(self, tokens: Sequence[int], last: bool = False) -> int | None:
        """Number of tokens of the text up to the one that completes a stop; None as long as there is no stop in it.

        Args:
            tokens: those that are new.
            last: whether the text ends with them.
        """


@dataclass(frozen=True)
class Owner:
    """Whose a generation is. Names are opaque, and tell nothing that a client could keep secret.

    Attributes:
        name: owners share equally in what a group gets.
        group: groups share equally in what there is, and each has the limits that `Quota` names.
        ahead: whether priorities count against other owners' too, and no quota does.
    """

    name: str = ""
    group: str = ""
    ahead: bool = False


@dataclass(frozen=True)
class GenerationRequest:
    """One generation, validated.

    Attributes:
        prompt, suffix: token ids before and after the generation region.
        max_tokens: longest text. A model that writes block by block denoises the rest of the last block too.
        sampler, params: the unmasking rule, bound to what it requires.
        name: what the sampler is called in metrics and logs.
        modifiers: what is around the rule, with parameters, in order.
        block_length: positions denoised together; None is full diffusion.
        choice, seed: how tokens are chosen, and the generation's random stream.
        end_ids: tokens that end the text; empty: denoise the whole region.
        stop: asked after every forward, on the engine's thread; belongs to this generation alone.
        fill_after_end: settle everything after an end-of-text at once.
        cache: what is kept from a block's first forward for its others.
        timeout: seconds from submission after which it is ended; None: never.
        counts_prompt: False where another generation of the same request has the same prompt.
        priority: who waits with a smaller one is admitted first, of the owner's own.
        owner: whose share it uses up.
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
    """The end. `completion_tokens` counts up to and including the first end-of-text, or what completes a stop."""

    reason: FinishReason
    completion_tokens: int
    forwards: int
    message: str = ""


Event = StepEvent | Finished


class EngineError(Exception):
    """The engine refuses a request or cannot serve it."""


class RequestError(EngineError):
    """A request that cannot be served as it is. `field` names what to change, `code` the kind of error."""

    def __init__(self, field: str, message: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.field = field
        self.code = code


@dataclass(frozen=True)
class Budget:
    """What a group has left of its tokens a minute. `reset`: seconds until it has all of them again."""

    limit: int
    remaining: int
    reset: float


class QueueFullError(EngineError):
    """The waiting queue is full: try again later."""


class KeyLimitError(EngineError):
    """A group of owners has had what it may have.

    Attributes:
        limit: which of the quota's.
        wait: seconds until there may be room; inf: there never is.
        budget: what is left of the tokens, where these are limited.
    """

    def __init__(self, limit: str, message: str, wait: float, budget: Budget | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.wait = wait
        self.budget = budget


class NotServingError(EngineError):
    """The engine is draining, stopped or dead."""
