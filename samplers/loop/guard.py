"""What stands between the loop and a sampler: whatever one does when it is asked, only its own generation fails.

A sampler may be anybody's. What it is given is its own copy, what it answers is held against the contract and copied,
and all that it raises becomes a SamplerError whose message is short and plain. This guards against faults. It is no
sandbox: a sampler is code in this process, which it can block, exit or fill.
"""

import math
import operator
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.contract import ParameterError, Sampler, SamplerError, SamplerParams
from samplers.forward.statistics import LogitBonus, Statistic
from samplers.forward.token_choice import TokenChoice

SHOWN = 300
"""Characters of a sampler's own texts that a message repeats."""
FRAMES = 20
"""Innermost frames of a failure that a log shows."""
MOST_NUMBERS = 1024
"""Largest probabilities, named tokens, or additions to logits that a sampler may have a position."""
MOST_STEPS = 10_000
"""Most forwards that a sampler may ask for a block beyond those that its positions give it."""

HOOKS = ("choice", "name_tokens", "bonus")

T = TypeVar("T")
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


class ContractError(SamplerError):
    """An answer that no sampler may give. The message says so without the sampler's name."""


def shown(text: object | Callable[[], object], most: int = SHOWN) -> str:
    """As much of a text, or of what reads one, as fits into a line, whatever its own code does when it is asked."""
    try:
        found = str.__getitem__(str(text() if isinstance(text, FunctionType) else text), slice(0, most + 1))
    except BaseException as error:
        if is_interrupt(error):
            raise
        return "(a text that cannot be shown)"
    plain = "".join(c if c.isprintable() else " " for c in found)
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def is_interrupt(error: BaseException) -> bool:
    """Whether it is a user's Ctrl-C, which reaches the main thread only, and that where nothing else handles it."""
    return (
        type(error) is KeyboardInterrupt
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def name_of(sampler: Sampler) -> str:
    """Its name, for a message."""
    return shown(lambda: sampler.name, 100)


def failure(sampler: Sampler, error: BaseException) -> SamplerError:
    """The error of a generation whose sampler raised this, for whoever has just caught it.

    Its cause tells a log where in the sampler that was. A sampler that exits, or whose native code panics, fails its
    own generation too. Raises what a user's Ctrl-C raises.
    """
    if is_interrupt(error):
        raise error
    name = name_of(sampler)
    if type(error) is ContractError:
        return SamplerError(f"sampler {name} failed: {shown(error)}")
    said = f"{shown(lambda: type(error).__name__, 80)}: {shown(error)}"
    found = SamplerError(f"sampler {name} failed: {said}")
    # Not the error itself: a log would show its message, its notes and its causes, whatever they are.
    found.__cause__ = SamplerError(said).with_traceback(_innermost(sys.exc_info()[2]))
    return found


def _innermost(found: TracebackType | None) -> TracebackType | None:
    frames = []
    while found is not None:
        frames.append(found)
        found = found.tb_next
    return frames[max(0, len(frames) - FRAMES)] if frames else None


def told(sampler: Sampler, hook: Callable[..., T], *arguments: Any) -> T:
    """What something of a sampler's answers. Raises SamplerError for whatever it raises or leaves changed."""
    before = _settings()
    try:
        answer = hook(*arguments)
        if _settings() == before:
            return answer
        raise ContractError("it left torch's settings changed, which are not its own")
    except BaseException as error:
        found = failure(sampler, error)
    _restore(before)
    raise found  # not in there, where the error itself would stay with it


class _Settings(NamedTuple):
    """What a sampler could change for everybody: how tensors are made, and how everything is computed.

    `functions` and `dispatches` are modes that were entered, and not left, which see every operation.
    """

    functions: int
    dispatches: int
    dtype: torch.dtype
    device: torch.device
    gradients: bool
    threads: int
    precision: str
    autocast: bool


def _settings() -> _Settings:
    made = torch.empty(0)
    return _Settings(
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        made.dtype,
        made.device,
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
    )


def _restore(before: _Settings) -> None:
    while torch._C._len_torch_dispatch_stack() > before.dispatches:
        torch._C._pop_torch_dispatch_stack(None)
    if torch._C._len_torch_function_stack() > before.functions:
        while torch._C._len_torch_function_stack():  # all, because a device's mode goes below those that are there
            torch._C._pop_torch_function_stack()
    torch.set_default_device(None if before.device.type == "cpu" else before.device)
    torch.set_default_dtype(before.dtype)
    torch.set_grad_enabled(before.gradients)
    if torch.get_num_threads() != before.threads:
        torch.set_num_threads(before.threads)
    torch.set_float32_matmul_precision(before.precision)
    torch.set_autocast_enabled("cpu", before.autocast)


@dataclass(frozen=True)
class Traits:
    """A sampler's attributes (see `Sampler`), as they were when a generation began.

    `hooks` are those of its methods for single steps that are its own; the others need not be asked.
    """

    statistics: frozenset[Statistic]
    top: int
    region: bool
    revises: bool
    greedy: bool
    drafts: bool
    hooks: frozenset[str] = frozenset()

    @classmethod
    def of(cls, sampler: Sampler) -> "Traits":
        """Read them once. Raises SamplerError if they are none."""
        return told(sampler, cls._read, sampler)

    @classmethod
    def _read(cls, sampler: Sampler) -> "Traits":
        statistics = sampler.statistics
        if not isinstance(statistics, frozenset | set | tuple | list):
            raise ContractError("statistics is not a set of them")
        if unknown := set(statistics) - set(Statistic):
            raise ContractError(f"there is no statistic {min(map(shown, unknown))!r}; there are {', '.join(Statistic)}")
        top = sampler.top
        if not isinstance(top, int) or not 0 <= top <= MOST_NUMBERS:
            raise ContractError(f"top is not a number of probabilities from 0 to {MOST_NUMBERS}")
        flags = {name: getattr(sampler, name) for name in ("region", "revises", "greedy", "drafts")}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ContractError(f"{name} is neither True nor False")
        own = {name for name in HOOKS if getattr(getattr(sampler, name), "__func__", None) is not vars(Sampler)[name]}
        return _alike(cls(frozenset(map(Statistic, statistics)), int(top), **flags, hooks=frozenset(own)))


@lru_cache(maxsize=256)
def _alike(traits: Traits) -> Traits:
    """One object for all that are equal: rows are put together by it in every step."""
    return traits


def incompatibility(sampler: Sampler, pattern: AttentionPattern) -> str | None:
    """Why it cannot denoise what is read by this pattern; None if it can. Raises SamplerError."""

    def ask() -> str | None:
        reason: object = sampler.incompatibility(replace(pattern))
        if reason is None or isinstance(reason, str):
            return shown(reason, 2 * SHOWN) if reason else None
        raise ContractError("incompatibility must say why in words, or None")

    return told(sampler, ask)


def why_not(sampler: Sampler, pattern: AttentionPattern) -> str | None:
    """`incompatibility` for lists of samplers: one that fails when it is asked cannot denoise anything either."""
    try:
        return incompatibility(sampler, pattern)
    except SamplerError as error:
        return str(error)


def own_params(sampler: Sampler, params: SamplerParams) -> SamplerParams:
    """A copy for one generation: what its sampler does to it is nothing to others. Raises SamplerError."""

    def copy() -> SamplerParams:
        found: object = params.model_copy(deep=True)
        if not isinstance(found, SamplerParams):
            raise ContractError("a copy of its parameters is none")
        return found

    return told(sampler, copy)


def check_params(sampler: Sampler, params: SamplerParams, layout: Layout) -> None:
    """Raise ParameterError, with a field and a message that are short texts, if a sampler does; else SamplerError."""

    def ask() -> ParameterError | None:
        try:
            sampler.check(params, layout.twin)
        except ParameterError as error:
            raised = error
            return ParameterError(shown(lambda: raised.field, 80), shown(raised))
        return None

    if refused := told(sampler, ask):
        raise refused


def start(sampler: Sampler, params: SamplerParams) -> Any:
    """What a sampler keeps of a generation to begin with. Raises SamplerError."""
    return told(sampler, lambda: sampler.start(params))


def most_steps(sampler: Sampler, traits: Traits, params: SamplerParams) -> int:
    """Most forwards of a drafted block, or of a revised one beyond two a position. Raises SamplerError."""
    if traits.drafts:
        return count(sampler, "draft_steps", 1, MOST_STEPS, params)
    return count(sampler, "post_steps", 0, MOST_STEPS, params) if traits.revises else 0


def count(sampler: Sampler, name: str, least: int, most: int, *arguments: Any) -> int:
    """A number that a sampler says when its method of that name is asked. Raises SamplerError."""

    def ask() -> int:
        found: object = getattr(sampler, name)(*arguments)
        try:
            number = operator.index(found)  # type: ignore[arg-type]
        except TypeError:
            number = least - 1
        if not least <= number <= most:
            raise ContractError(f"{name} must be an integer from {least} to {most}, not {shown(found, 80)}")
        return number

    return told(sampler, ask)


def choice(sampler: Sampler, params: SamplerParams, block_step: int) -> TokenChoice | None:
    """How a sampler has tokens chosen, if it says so. Raises SamplerError."""

    def ask() -> TokenChoice | None:
        found: object = sampler.choice(params, block_step)
        if found is None:
            return None
        if not isinstance(found, TokenChoice):
            raise ContractError("choice must be a TokenChoice or None")
        temperature, top_p, top_k = found.temperature, found.top_p, found.top_k
        if not (_is_number(temperature) and temperature >= 0 and _is_number(top_p) and 0 < top_p <= 1):
            raise ContractError("a choice has a finite temperature from 0 on and a top_p above 0 and up to 1")
        if not isinstance(top_k, int) or not 0 <= top_k < 2**31:
            raise ContractError("a choice's top_k is an integer from 0 on")
        return TokenChoice(float(temperature), float(top_p), int(top_k))

    return told(sampler, ask)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plain(value: object, what: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """A copy of a sampler's tensor, which is a usual one, of this shape. Raises ContractError."""
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_nested or value.device.type != "cpu":
        raise ContractError(f"{what} must be a plain dense tensor on the CPU")
    if shape is not None and value.shape != shape:
        raise ContractError(f"{what} must be of shape {list(shape)}, not {shown(list(value.shape), 80)}")
    return (value.detach() if value.requires_grad else value).clone()


def names(sampler: Sampler, state: Any, positions: Tensor, widest: int, vocabulary: int | None) -> Tensor | None:
    """The tokens that a sampler names at each of n positions, int64 [n, m] with -1 for none. Raises SamplerError.

    Args:
        widest: most tokens at a position.
        vocabulary: number of the model's tokens, if it is known.
    """

    def ask() -> Tensor | None:
        found: object = sampler.name_tokens(state, positions.clone())
        if found is None:
            return None
        if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] > widest or found.dtype not in INTEGERS:
            raise ContractError(f"named tokens must be integers [positions, at most {widest}]")
        tokens = plain(found, "named tokens", (len(positions), found.shape[1]))
        if tokens.numel() and not _within(tokens, -1, vocabulary):
            raise ContractError("a token that does not exist was named")
        return tokens.long()

    return told(sampler, ask)


def bonus(
    sampler: Sampler, params: SamplerParams, tokens: Tensor, places: Tensor, vocabulary: int | None
) -> LogitBonus | None:
    """What a sampler adds to the logits of n places. Raises SamplerError."""

    def ask() -> LogitBonus | None:
        found: object = sampler.bonus(params, tokens.clone(), places.clone())
        if found is None:
            return None
        if not isinstance(found, tuple | list) or len(found) != 3:
            raise ContractError("a bonus must be indices, tokens and values")
        if any(isinstance(each, Tensor) and each.numel() > MOST_NUMBERS * len(places) for each in found):
            raise ContractError(f"a bonus has at most {MOST_NUMBERS} additions a position")
        index, token, value = (plain(each, "each part of a bonus") for each in found)
        if index.dim() != 1 or not index.shape == token.shape == value.shape:
            raise ContractError("indices, tokens and values of a bonus must be of one length")
        if index.dtype not in INTEGERS or token.dtype not in INTEGERS or not value.is_floating_point():
            raise ContractError("indices and tokens of a bonus must be integers, and values floats")
        if len(index) and not (_within(index, 0, len(places)) and _within(token, 0, vocabulary)):
            raise ContractError("a bonus is for a position or a token that does not exist")
        value = value.float()
        if not bool((value < torch.inf).all()):
            raise ContractError("a bonus is not finite")  # minus infinity bans a token
        return LogitBonus(index.long(), token.long(), value)

    return told(sampler, ask)


def _within(values: Tensor, least: int, stop: int | None) -> bool:
    """Whether integers lie from `least` to before `stop`."""
    smallest, largest = values.aminmax()
    return bool(smallest >= least) and (stop is None or bool(largest < stop))
