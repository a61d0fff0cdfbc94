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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType, TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from samplers.attention_pattern import AttentionPattern
from samplers.canvas import Layout
from samplers.columns import ColumnSpec
from samplers.contract import (
    Modifier,
    ParameterError,
    Resampling,
    Sampler,
    SamplerError,
    SamplerParams,
    Slots,
    StateSpec,
    StepContext,
    TokenBonus,
    View,
    Window,
)
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoices

SHOWN = 300
"""Characters of a sampler's own texts that a message repeats."""
FRAMES = 20
"""Innermost frames of a failure that a log shows."""
MOST_NUMBERS = 1024
"""Largest probabilities, named tokens, or additions to logits that a sampler may have a position."""
MOST_CANVASES = 1024
"""Canvases of one generation."""
MOST_VIEWS = 8
"""Canvases that the model may see of one in a step."""
MOST_STEPS = 10_000
"""Most forwards that a sampler may ask for a block beyond those that its positions give it."""

HOOKS = ("choice", "name_tokens", "bonus", "window", "adjust", "after")

T = TypeVar("T")
Owner = Sampler[Any] | Modifier[Any]
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


def name_of(sampler: Owner) -> str:
    """Its name, for a message."""
    return shown(lambda: sampler.name, 100)


def failure(sampler: Owner, error: BaseException) -> SamplerError:
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


def told(sampler: Owner, hook: Callable[..., T], *arguments: Any) -> T:
    """What something of a sampler's, or a modifier's, answers.

    Raises SamplerError for whatever it raises or leaves changed.

    Our own rules are known to change no settings; a contract suite holds them to it.
    """
    if is_ours(type(sampler)):
        try:
            return hook(*arguments)
        except BaseException as error:
            found = failure(sampler, error)
        raise found
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
    """Attributes of a sampler and the modifiers around it (see `Sampler`), as they were when a generation began.

    Attributes:
        state: what each of them keeps, the sampler first.
        hooks: of each of them, those methods for single steps that are its own; the others need not be asked.
        ours: whether all of them are from this package.
    """

    statistics: frozenset[Statistic]
    top: int
    whole_region: bool
    sees_region: bool
    revises: bool
    chooses_tokens: bool
    drafts: bool
    state: tuple[tuple[tuple[str, StateSpec], ...], ...] = ((),)
    hooks: tuple[frozenset[str], ...] = (frozenset(),)
    ours: bool = False

    @classmethod
    def of(cls, sampler: Sampler[Any], modifiers: Sequence[Modifier[Any]] = ()) -> "Traits":
        """Read them once. Raises SamplerError if they are none."""
        found = told(sampler, cls._read, sampler)
        for modifier in modifiers:
            found = told(modifier, found._with, modifier)
        return _alike(found)

    @classmethod
    def _read(cls, sampler: Sampler[Any]) -> "Traits":
        flags = {
            name: getattr(sampler, name)
            for name in ("whole_region", "sees_region", "revises", "chooses_tokens", "drafts")
        }
        _check_flags(flags)
        return cls(
            _statistics(sampler),
            _top(sampler),
            **flags,
            state=(_state(sampler),),
            hooks=(_own_hooks(sampler, Sampler),),
            ours=is_ours(type(sampler)),
        )

    def _with(self, modifier: Modifier[Any]) -> "Traits":
        flags = {"chooses_tokens": modifier.chooses_tokens}
        _check_flags(flags)
        return replace(
            self,
            statistics=self.statistics | _statistics(modifier),
            top=max(self.top, _top(modifier)),
            chooses_tokens=self.chooses_tokens or flags["chooses_tokens"],
            state=(*self.state, _state(modifier)),
            hooks=(*self.hooks, _own_hooks(modifier, Modifier)),
            ours=self.ours and is_ours(type(modifier)),
        )

    def any_has(self, hook: str) -> bool:
        """Whether the sampler or a modifier has this method of its own."""
        return any(hook in own for own in self.hooks)


def _statistics(owner: Owner) -> frozenset[Statistic]:
    statistics = owner.statistics
    if not isinstance(statistics, frozenset | set | tuple | list):
        raise ContractError("statistics is not a set of them")
    if unknown := set(statistics) - set(Statistic):
        raise ContractError(f"there is no statistic {min(map(shown, unknown))!r}; there are {', '.join(Statistic)}")
    return frozenset(map(Statistic, statistics))


def _top(owner: Owner) -> int:
    top = owner.top
    if not isinstance(top, int) or not 0 <= top <= MOST_NUMBERS:
        raise ContractError(f"top is not a number of probabilities from 0 to {MOST_NUMBERS}")
    return int(top)


def _check_flags(flags: dict[str, Any]) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ContractError(f"{name} is neither True nor False")


def _state(owner: Owner) -> tuple[tuple[str, StateSpec], ...]:
    state = dict(owner.state)
    for name, spec in state.items():
        if not isinstance(name, str) or type(spec) is not StateSpec:
            raise ContractError("state is not a StateSpec for each name")
        if spec.per not in ("row", "position") or spec.lives not in ("block", "generation"):
            raise ContractError(f"state {shown(name, 80)} is per row or position, and lives for a block or generation")
        if math.prod((1, *spec.shape)) > MOST_NUMBERS or not isinstance(spec.dtype, torch.dtype):
            raise ContractError(f"state {shown(name, 80)} has a dtype, and a shape of at most {MOST_NUMBERS} numbers")
        torch.full((1, *spec.shape), spec.fill, dtype=spec.dtype)
    return tuple(state.items())


def _own_hooks(owner: Owner, base: type) -> frozenset[str]:
    return frozenset(
        name
        for name in HOOKS
        if name in vars(base) and getattr(getattr(owner, name), "__func__", None) is not vars(base)[name]
    )


@lru_cache(maxsize=1024)
def is_ours(kind: type) -> bool:
    """Whether a class is one of this package's."""
    return kind.__module__.split(".")[0] == "samplers"


@lru_cache(maxsize=256)
def _alike(traits: Traits) -> Traits:
    """One object for all that are equal: rows are put together by it in every step."""
    return traits


def incompatibility(
    sampler: Sampler[Any], pattern: AttentionPattern, modifiers: Sequence[Modifier[Any]] = ()
) -> str | None:
    """Why it cannot denoise what is read by this pattern, or with these modifiers around it; None if it can.

    Raises SamplerError.
    """

    def ask(hook: Callable[..., object], *arguments: object) -> str | None:
        reason = hook(*arguments)
        if reason is None or isinstance(reason, str):
            return shown(reason, 2 * SHOWN) if reason else None
        raise ContractError("incompatibility must say why in words, or None")

    if reason := told(sampler, ask, sampler.incompatibility, replace(pattern)):
        return reason
    for i, modifier in enumerate(modifiers):
        before = list(modifiers[:i])
        if reason := told(modifier, ask, modifier.incompatibility, sampler, replace(pattern), before):
            return reason
    return None


def why_not(sampler: Sampler[Any], pattern: AttentionPattern) -> str | None:
    """`incompatibility` for lists of samplers: one that fails when it is asked cannot denoise anything either."""
    try:
        return incompatibility(sampler, pattern)
    except SamplerError as error:
        return str(error)


def own_params(sampler: Owner, params: SamplerParams) -> SamplerParams:
    """A copy for one generation: what its sampler does to it is nothing to others. Raises SamplerError."""

    def copy() -> SamplerParams:
        found: object = params.model_copy(deep=True)
        if not isinstance(found, SamplerParams):
            raise ContractError("a copy of its parameters is none")
        return found

    return told(sampler, copy)


def check_params(sampler: Owner, params: SamplerParams, layout: Layout) -> None:
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


def column_values(owner: Owner, spec: ColumnSpec, params: SamplerParams) -> list[float]:
    """Parameters as numbers (see `StepContext.param`). Raises SamplerError."""
    return told(owner, lambda: list(spec.values(params)))


def views(sampler: Sampler[Any], modifiers: Sequence[tuple[Modifier[Any], SamplerParams]]) -> list[View]:
    """Canvases that the model sees in every step, that of the generation itself first. Raises SamplerError."""
    found: Sequence[View] = (View(),)
    for modifier, params in modifiers:
        found = told(modifier, lambda: _checked_views(modifier.views(params, found)))  # noqa: B023
    return list(found)


def _checked_views(found: Sequence[View]) -> Sequence[View]:
    found = list(found)
    if not found or len(found) > MOST_VIEWS or not all(type(view) is View for view in found):
        raise ContractError(f"views must be 1 to {MOST_VIEWS} View objects")
    if found[0].prompt is not None:
        raise ContractError("the first view must be the canvas itself")
    if not all(_is_number(view.weight) for view in found):
        raise ContractError("a view's weight must be a finite number")
    return found


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


def choice(sampler: Sampler[Any], context: StepContext[Any]) -> TokenChoices | None:
    """How a sampler has tokens chosen, if it says so; [rows]. Raises SamplerError."""

    def ask() -> TokenChoices | None:
        found: object = sampler.choice(context)
        if found is None:
            return None
        if not isinstance(found, TokenChoices):
            raise ContractError("choice must be TokenChoices or None")
        rows = len(context.candidate)
        temperature, top_p, top_k = (
            plain(each, f"a choice's {name}", context.candidate, (rows, 1))[:, 0]
            for name, each in (("temperature", found.temperature), ("top_p", found.top_p), ("top_k", found.top_k))
        )
        if not (temperature.is_floating_point() and top_p.is_floating_point() and top_k.dtype in INTEGERS):
            raise ContractError("a choice's temperature and top_p are floats, its top_k an integer")
        usable = temperature.isfinite() & (temperature >= 0) & (top_p > 0) & (top_p <= 1)
        if not bool(usable.all()):
            raise ContractError("a choice has a finite temperature from 0 on and a top_p above 0 and up to 1")
        if not bool(((top_k >= 0) & (top_k < 2**31)).all()):
            raise ContractError("a choice's top_k is an integer from 0 on")
        return TokenChoices(temperature.double(), top_p.double(), top_k.long())

    return told(sampler, ask)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def plain(value: object, what: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A copy of a sampler's tensor: a usual one, of this shape, on the device of another. Raises ContractError."""
    usual = type(value) is type(like) and value.layout is torch.strided and not value.is_nested
    if not usual or value.device != like.device:
        raise ContractError(f"{what} must be a plain dense tensor on {like.device}")
    if shape is not None and value.shape != shape:
        raise ContractError(f"{what} must be of shape {list(shape)}, not {shown(list(value.shape), 80)}")
    return (value.detach() if value.requires_grad else value).clone()


def names(owner: Owner, context: StepContext[Any], vocabulary: int | None) -> Tensor | None:
    """The tokens that a sampler names, int64 [rows, width, m] with -1 for none. Raises SamplerError.

    Args:
        vocabulary: number of the model's tokens, if it is known.
    """

    def ask() -> Tensor | None:
        found: object = owner.name_tokens(context)
        if found is None:
            return None
        rows, width = context.candidate.shape
        if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[2] > MOST_NUMBERS:
            raise ContractError(f"named tokens must be integers [rows, width, at most {MOST_NUMBERS}]")
        tokens = plain(found, "named tokens", context.candidate, (rows, width, found.shape[2]))
        if tokens.dtype not in INTEGERS:
            raise ContractError(f"named tokens must be integers [rows, width, at most {MOST_NUMBERS}]")
        if tokens.numel() and not _within(tokens, -1, vocabulary):
            raise ContractError("a token that does not exist was named")
        return tokens.long()

    return told(owner, ask)


def bonus(owner: Owner, context: StepContext[Any], vocabulary: int | None) -> TokenBonus | None:
    """What a sampler adds to logits, [rows, width, n]. Raises SamplerError."""

    def ask() -> TokenBonus | None:
        found: object = owner.bonus(context)
        if found is None:
            return None
        if not isinstance(found, TokenBonus):
            raise ContractError("a bonus must be a TokenBonus or None")
        token, value = (
            plain(each, f"a bonus's {name}", context.candidate)
            for name, each in (("tokens", found.token), ("values", found.value))
        )
        shape = context.candidate.shape
        if token.dim() != 3 or token.shape[:2] != shape or token.shape != value.shape:
            raise ContractError("tokens and values of a bonus must both be [rows, width, n]")
        if token.shape[2] > MOST_NUMBERS:
            raise ContractError(f"a bonus has at most {MOST_NUMBERS} additions a position")
        if token.dtype not in INTEGERS or not value.is_floating_point():
            raise ContractError("tokens of a bonus must be integers, and values floats")
        if token.numel() and not _within(token, -1, vocabulary):
            raise ContractError("a bonus is for a token that does not exist")
        value = value.float()
        if not bool((value < torch.inf).all()):
            raise ContractError("a bonus is not finite")  # minus infinity bans a token
        return TokenBonus(token.long(), value)

    return told(owner, ask)


def window(sampler: Sampler[Any], context: StepContext[Any]) -> Window | None:
    """Where a sampler wants its candidates, [rows, 1] each. Raises SamplerError."""

    def ask() -> Window | None:
        found: object = sampler.window(context)
        if found is None:
            return None
        if not isinstance(found, Window):
            raise ContractError("window must be a Window or None")
        rows = len(context.candidate)
        start, stop = (
            plain(each, f"a window's {name}", context.candidate, (rows, 1))
            for name, each in (("start", found.start), ("stop", found.stop))
        )
        if start.dtype not in INTEGERS or stop.dtype not in INTEGERS:
            raise ContractError("a window's bounds are integers")
        return Window(start.long(), stop.long())

    return told(sampler, ask)


def resample(sampler: Sampler[Any], slots: Slots[Any]) -> Resampling | None:
    """The canvases that go on after a barrier. Raises SamplerError."""
    count = len(slots.finished)

    def ask() -> Resampling | None:
        found: object = sampler.resample(slots)
        if found is None:
            return None
        if not isinstance(found, Resampling):
            raise ContractError("resample must return a Resampling or None")
        ancestors = plain(found.ancestors, "resample's ancestors", slots.finished, (count,))
        if ancestors.dtype not in INTEGERS or not _within(ancestors, 0, count):
            raise ContractError(f"resample must say which of {count} canvases each goes on from")
        state = {}
        for name, value in dict(found.state).items():
            if name not in slots.state:
                raise ContractError("it keeps a state that it has not declared")
            state[name] = plain(value, "a state", slots.finished, tuple(slots.state[name].shape))
            if state[name].dtype != slots.state[name].dtype:
                raise ContractError(f"a state must be of type {slots.state[name].dtype}")
        return Resampling(ancestors.long(), state)

    return told(sampler, ask)


def winner(sampler: Sampler[Any], slots: Slots[Any], count_: int) -> int:
    """The canvas that is the generation's. Raises SamplerError."""
    return count(sampler, "winner", 0, count_ - 1, slots)


def _within(values: Tensor, least: int, stop: int | None) -> bool:
    """Whether integers lie from `least` to before `stop`."""
    smallest, largest = values.aminmax()
    return bool(smallest >= least) and (stop is None or bool(largest < stop))
