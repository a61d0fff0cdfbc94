"""Isolation of samplers: a fault of a sampler ends only its own generation.

Samplers may come from third parties. They get copies of all inputs; their answers are validated and copied; their
exceptions become a SamplerError with a short plain message. This guards against faults and is not a sandbox: a sampler
runs in this process, and can block it, exit it or exhaust its memory.
"""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    Sampler,
    SamplerError,
    SamplerParams,
)

SHOWN = 300
"""Maximum characters of a sampler's own texts in a message."""
FRAMES = 20
"""Number of innermost frames of a failure in the log."""
MOST_NUMBERS = 1024
"""Maximum number per position of largest probabilities, named tokens, or additions to logits."""

T = TypeVar("T")
Owner = Sampler[Any] | Modifier[Any]
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})


class ContractError(SamplerError):
    """An answer outside the sampler contract. The message does not include the sampler's name."""


def shown(text: object | Callable[[], object], most: int = SHOWN) -> str:
    """A text, or the result of a function that reads one, shortened to one line. Errors in the text's own code are
    caught."""
    try:
        found = str.__getitem__(str(text() if isinstance(text, FunctionType) else text), slice(0, most + 1))
    except BaseException as error:
        if is_interrupt(error):
            raise
        return "(a text that cannot be shown)"
    plain = "".join(c if c.isprintable() else " " for c in found)
    return plain if len(plain) <= most else f"{plain[: most - 3]}..."


def is_interrupt(error: BaseException) -> bool:
    """True for a user's Ctrl-C: a KeyboardInterrupt in the main thread that nothing else handles."""
    return (
        type(error) is KeyboardInterrupt
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def suspect(sampler: Sampler[Any], modifiers: Sequence[Modifier[Any]]) -> Owner:
    """The sampler or modifier to blame for their joint result: the first third-party one."""
    owners: list[Owner] = [sampler, *modifiers]
    return next((each for each in owners if not is_ours(type(each))), sampler)


def name_of(sampler: Owner) -> str:
    """Name of a sampler for messages."""
    return shown(lambda: sampler.name, 100)


def failure(sampler: Owner, error: BaseException) -> SamplerError:
    """The error of a generation whose sampler raised `error`; call it in the `except` clause.

    Its cause carries the traceback inside the sampler, for the log. Also covers samplers that exit or whose native code
    panics. Reraises a user's Ctrl-C.
    """
    if is_interrupt(error):
        raise error
    name = f"{'modifier' if isinstance(sampler, Modifier) else 'sampler'} {name_of(sampler)}"
    if type(error) is ContractError:
        return SamplerError(f"{name} failed: {shown(error)}")
    said = f"{shown(lambda: type(error).__name__, 80)}: {shown(error)}"
    found = SamplerError(f"{name} failed: {said}")
    # Replaces the error itself, whose message, notes and causes would all appear in the log.
    found.__cause__ = SamplerError(said).with_traceback(_innermost(sys.exc_info()[2]))
    return found


def _innermost(found: TracebackType | None) -> TracebackType | None:
    frames = []
    while found is not None:
        frames.append(found)
        found = found.tb_next
    return frames[max(0, len(frames) - FRAMES)] if frames else None


def told(sampler: Owner, hook: Callable[..., T], *arguments: Any) -> T:
    """Answer of a hook of a sampler or modifier.

    Raises SamplerError if the hook raises, or leaves settings of torch changed.

    Our own rules skip the check of settings; a contract suite tests them for it.
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
    raise found  # raised outside the `except` clause, which would attach the original error


class _Settings(NamedTuple):
    """Global settings that a sampler could change: defaults of new tensors, and modes of computation.

    `functions` and `dispatches` are modes on torch's stacks, which intercept every operation.
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


@lru_cache(maxsize=1024)
def is_ours(kind: type) -> bool:
    """True if a class is from this package."""
    return kind.__module__.split(".")[0] == "samplers"


def incompatibility(
    sampler: Sampler[Any], pattern: AttentionPattern, modifiers: Sequence[Modifier[Any]] = ()
) -> str | None:
    """Reason why the sampler cannot run with this pattern or these modifiers; None if it can.

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
        if any(modifier is each for each in before):
            return f"modifier {name_of(modifier)} is given twice"
        if reason := told(modifier, ask, modifier.incompatibility, sampler, replace(pattern), before):
            return reason
    return None


def why_not(sampler: Sampler[Any], pattern: AttentionPattern) -> str | None:
    """`incompatibility` for lists of samplers: a failure counts as a reason too."""
    try:
        return incompatibility(sampler, pattern)
    except SamplerError as error:
        return str(error)


def own_params(sampler: Owner, params: SamplerParams) -> SamplerParams:
    """A copy of the parameters for one generation, isolated from changes by its sampler. Raises SamplerError."""

    def copy() -> SamplerParams:
        found: object = params.model_copy(deep=True)
        if not isinstance(found, SamplerParams):
            raise ContractError("a copy of its parameters is none")
        return found

    return told(sampler, copy)


def check_params(sampler: Owner, params: SamplerParams, layout: Layout) -> None:
    """Run the sampler's own check. Raises ParameterError, with short field and message, or else SamplerError."""

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


def plain(found: object, what: str, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """A copy of a sampler's tensor, checked for plain type, shape and the device of `like`. Raises ContractError."""
    value: Tensor = found  # type: ignore[assignment]
    usual = type(value) is type(like) and value.layout is torch.strided and not value.is_nested
    if not usual or value.device != like.device:
        raise ContractError(f"{what} must be a plain dense tensor on {like.device}")
    if shape is not None and value.shape != shape:
        raise ContractError(f"{what} must be of shape {list(shape)}, not {shown(list(value.shape), 80)}")
    return (value.detach() if value.requires_grad else value).clone()
