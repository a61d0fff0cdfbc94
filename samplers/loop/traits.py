"""Attributes of samplers, read once when a generation begins, and validated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from samplers.contract import Modifier, Sampler, StateSpec
from samplers.forward.statistics import Statistic
from samplers.loop.guard import MOST_NUMBERS, ContractError, Owner, is_ours, shown, told

HOOKS = ("choice", "name_tokens", "bonus", "window", "adjust", "after")


@dataclass(frozen=True)
class Traits:
    """Attributes of a sampler and the modifiers around it (see `Sampler`), as read when a generation began.

    Attributes:
        state: state specs of each of them, the sampler first.
        hooks: per-step methods that each of them overrides; others are not called.
        ours: True if all of them are from this package.
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
    barrier: str = "block"

    @classmethod
    def of(cls, sampler: Sampler[Any], modifiers: Sequence[Modifier[Any]] = ()) -> "Traits":
        """Read them once. Raises SamplerError if they are invalid."""
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
            barrier=_barrier(sampler),
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
        """True if the sampler or a modifier overrides this method."""
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


def _barrier(sampler: Sampler[Any]) -> str:
    found: object = sampler.barrier
    for known in ("step", "block"):
        if type(found) is str and found == known:
            return known
    raise ContractError("barrier is neither step nor block")


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


@lru_cache(maxsize=256)
def _alike(traits: Traits) -> Traits:
    """One shared object for equal traits: rows are grouped by it in every step."""
    return traits
