"""Validation of the answers of samplers and modifiers outside of `select`."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samplers.canvas import Layout
from samplers.contract import (
    Modifier,
    ParameterError,
    Resampling,
    Sampler,
    SamplerParams,
    Slots,
    StepContext,
    TokenBonus,
    View,
    Window,
)
from samplers.forward.token_choice import TokenChoices
from samplers.loop.guard import INTEGERS, MOST_NUMBERS, ContractError, Owner, plain, shown, told
from samplers.loop.traits import Traits

MOST_CANVASES = 1024
"""Maximum number of canvases of one generation."""
MOST_VIEWS = 8
"""Maximum number of views of a canvas in a step."""
MOST_TOKENS = 1 << 20
"""Maximum number of tokens in a view's prompt."""
MOST_STEPS = 10_000
"""Maximum value of `Sampler.post_steps` and `Sampler.draft_steps`."""


def views(
    modifiers: Sequence[tuple[Modifier[Any], SamplerParams]], layout: Layout, vocabulary: int | None
) -> list[View]:
    """Views of every step, that of the generation itself first.

    Args:
        vocabulary: number of the model's tokens, if known.

    Raises SamplerError, and ParameterError if a modifier's own parameters are to blame.
    """
    found: Sequence[View] = (View(),)

    def ask(modifier: Modifier[Any], params: SamplerParams) -> Sequence[View] | ParameterError:
        try:
            return _checked_views(modifier.views(params, found), layout, vocabulary)
        except ParameterError as error:
            raised = error
            return ParameterError(shown(lambda: raised.field, 80), shown(raised))

    for modifier, params in modifiers:
        answer = told(modifier, ask, modifier, params)
        if isinstance(answer, ParameterError):
            raise answer
        found = answer
    return list(found)


def _checked_views(found: Sequence[View], layout: Layout, vocabulary: int | None) -> Sequence[View]:
    found = list(found)
    if not found or len(found) > MOST_VIEWS or not all(type(view) is View for view in found):
        raise ContractError(f"views must be 1 to {MOST_VIEWS} View objects")
    if found[0].prompt is not None:
        raise ContractError("the first view must be the canvas itself")
    if not all(_is_number(view.weight) for view in found):
        raise ContractError("a view's weight must be a finite number")
    for view in found:
        _check_prompt(view.prompt, layout, vocabulary)
    return found


def _check_prompt(prompt: object, layout: Layout, vocabulary: int | None) -> None:
    """Raise ContractError if a view's prompt is invalid, ParameterError if it does not fit this model."""
    if prompt is None:
        return
    if prompt == "masked":
        if layout.pattern.noise is not None:
            raise ParameterError("modifiers", "a view with a masked prompt needs a mask token, and this model has none")
        return
    if type(prompt) is not tuple or len(prompt) > MOST_TOKENS or not all(type(token) is int for token in prompt):
        raise ContractError(f"a view's prompt is None, 'masked' or at most {MOST_TOKENS} token ids")
    if any(token < 0 or (vocabulary is not None and token >= vocabulary) for token in prompt):
        raise ParameterError("modifiers", "a view's prompt has a token that this model does not have")
    size = layout.pattern.causal_block
    if size is not None and (len(prompt) - layout.prompt_length) % size:
        raise ParameterError(
            "modifiers",
            f"this model reads blocks of {size} positions: the lengths of a view's prompt, {len(prompt)}, and of the "
            f"prompt, {layout.prompt_length}, must differ by a multiple of that",
        )


def most_steps(sampler: Sampler[Any], traits: Traits, params: SamplerParams) -> int:
    """Maximum forwards of a drafted block, or of a revised one beyond two per position. Raises SamplerError."""
    if traits.drafts:
        return count(sampler, "draft_steps", 1, MOST_STEPS, params)
    return count(sampler, "post_steps", 0, MOST_STEPS, params) if traits.revises else 0


def count(sampler: Sampler[Any], name: str, least: int, most: int, *arguments: Any) -> int:
    """Integer answer of the sampler's method `name`, checked against its bounds. Raises SamplerError."""

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
    """Token choice set by a sampler, [rows]; None if it sets none. Raises SamplerError."""

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


def names(owner: Owner, context: StepContext[Any], vocabulary: int | None) -> Tensor | None:
    """Tokens named by a sampler, int64 [rows, width, m], -1: unused. Raises SamplerError.

    Args:
        vocabulary: number of the model's tokens, if known.
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
    """Additions to logits by a sampler, [rows, width, n]. Raises SamplerError."""

    def ask() -> TokenBonus | None:
        found: object = owner.bonus(context)
        if found is None:
            return None
        if not isinstance(found, TokenBonus):
            raise ContractError("a bonus must be a TokenBonus or None")
        sizes = [each.numel() for each in (found.token, found.value) if isinstance(each, Tensor)]
        if max(sizes, default=0) > MOST_NUMBERS * context.candidate.numel():
            raise ContractError(f"a bonus has at most {MOST_NUMBERS} additions a position")
        token, value = (
            plain(each, f"a bonus's {name}", context.candidate)
            for name, each in (("tokens", found.token), ("values", found.value))
        )
        shape = context.candidate.shape
        if token.dim() != 3 or token.shape[:2] != shape or token.shape != value.shape:
            raise ContractError("tokens and values of a bonus must both be [rows, width, n]")
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
    """Window of candidates set by a sampler, [rows, 1] each. Raises SamplerError."""

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
    """Canvases to continue with after a barrier. Raises SamplerError."""
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
    """Index of the canvas whose text becomes the generation's. Raises SamplerError."""
    return count(sampler, "winner", 0, count_ - 1, slots)


def _within(values: Tensor, least: int, stop: int | None) -> bool:
    """True if integers lie from `least` to `stop` (exclusive)."""
    smallest, largest = values.aminmax()
    return bool(smallest >= least) and (stop is None or bool(largest < stop))
