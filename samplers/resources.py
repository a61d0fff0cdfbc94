"""Auxiliaries that samplers require, by kind and name, and samplers bound to them."""

from collections.abc import Callable, Mapping
from typing import Any

from samplers.contract import ParameterError, Sampler, SamplerParams
from samplers.loop.guard import SHOWN, ContractError, shown, told
from samplers.registry import UnknownSamplerError, get_sampler

Find = Callable[[str | None], Any]


class ResourceTable:
    """One table of everything that a sampler can require.

    A kind is a function that finds one by name (None: the only one) and raises ParameterError, or what it is documented
    to raise, if there is none. The kind `sampler` is always there: rules that others are built on.
    """

    def __init__(self, kinds: Mapping[str, Find] | None = None) -> None:
        self._kinds: dict[str, Find] = {"sampler": _find_sampler, **(kinds or {})}
        self._reasons: dict[str, Callable[[], str | None]] = {}

    def add(self, kind: str, find: Find, missing: Callable[[], str | None] = lambda: None) -> None:
        """Add a kind. `missing` says why there is none of it at the moment; None if there is one."""
        self._kinds[kind] = find
        self._reasons[kind] = missing

    def find(self, kind: str, name: str | None) -> Any:
        """See `Resources.find`."""
        if kind not in self._kinds:
            raise ParameterError(kind, self.missing(kind) or "")
        return self._kinds[kind](name)

    def missing(self, kind: str) -> str | None:
        """See `Resources.missing`."""
        if kind not in self._kinds:
            return f"this server has no {kind}"
        return self._reasons[kind]() if kind in self._reasons else None

    def why_missing(self, sampler: Sampler[Any]) -> str | None:
        """Why a sampler lacks what it requires; None if all of it is there."""
        reasons = [self.missing(kind) for kind in dict(sampler.requires).values()]
        return next((reason for reason in reasons if reason is not None), None)


def _find_sampler(name: str | None) -> Sampler[Any]:
    try:
        return get_sampler(name or "threshold")
    except UnknownSamplerError as error:
        raise ParameterError("base", str(error)) from None


DEFAULT = ResourceTable()
"""Without a server: rules only."""


def bound(sampler: Sampler[Any], params: SamplerParams, resources: ResourceTable | None = None) -> Sampler[Any]:
    """The sampler with the auxiliaries that it requires. Raises ParameterError, and SamplerError if it fails."""

    def ask() -> Sampler[Any] | ParameterError:
        try:
            found: object = sampler.bind(resources or DEFAULT, params) if sampler.requires else sampler
        except ParameterError as error:
            raised = error
            return ParameterError(shown(lambda: raised.field, 80), shown(raised, 2 * SHOWN), raised.code)
        if not isinstance(found, Sampler):
            raise ContractError("bind must return a sampler")
        return found

    found = told(sampler, ask)
    if isinstance(found, ParameterError):
        raise found
    return found
