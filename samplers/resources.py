"""Auxiliaries that samplers require, by kind and name, and their binding to samplers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from samplers.contract import ParameterError, Sampler, SamplerParams
from samplers.loop.guard import SHOWN, ContractError, shown, told
from samplers.registry import UnknownSamplerError, get_sampler


@dataclass(frozen=True)
class Kind:
    """Auxiliaries of one kind.

    Attributes:
        find: look up an auxiliary by name, or the only one if the name is None. Raises ParameterError if there is none.
        missing: reason why there is currently none of this kind; None if there is one.
        only: name of the auxiliary that is found without a name; None if there is not exactly one.
        warnings: differences between the training of the named auxiliary and a generation, given its block length
            (None: full diffusion) and the maximum length of its text.
    """

    find: Callable[[str | None], Any]
    missing: Callable[[], str | None] = lambda: None
    only: Callable[[], str | None] = lambda: None
    warnings: Callable[[str, int | None, int], Sequence[str]] = lambda name, block_length, gen_length: ()


class ResourceTable:
    """Table of all auxiliaries that samplers can require.

    The kind `sampler` is always present: base rules of other samplers.
    """

    def __init__(self) -> None:
        self._kinds = {"sampler": Kind(_find_sampler)}

    def add(self, name: str, kind: Kind) -> None:
        """Add auxiliaries of one kind."""
        self._kinds[name] = kind

    def find(self, kind: str, name: str | None) -> Any:
        """See `Resources.find`."""
        if kind not in self._kinds:
            raise ParameterError("sampler", self.missing(kind) or "")
        return self._kinds[kind].find(name)

    def missing(self, kind: str) -> str | None:
        """See `Resources.missing`."""
        return self._kinds[kind].missing() if kind in self._kinds else f"this server has no {kind}"

    def why_missing(self, sampler: Sampler[Any]) -> str | None:
        """Reason why a requirement of the sampler is not met; None if all are."""
        reasons = (self.missing(kind) for kind in sampler.requires.values())
        return next((reason for reason in reasons if reason is not None), None)

    def named(self, sampler: Sampler[Any], params: SamplerParams) -> SamplerParams:
        """The parameters, with omitted names of auxiliaries filled in if there is only one of the kind."""
        update = {}
        for parameter, kind in sampler.requires.items():
            if getattr(params, parameter) is None and kind in self._kinds:
                update[parameter] = self._kinds[kind].only()
        return params.model_copy(update=update) if update else params

    def warnings(
        self, sampler: Sampler[Any], params: SamplerParams, block_length: int | None, gen_length: int
    ) -> list[str]:
        """Differences between the training of a sampler's auxiliaries and a generation (see `Kind`)."""
        return [
            warning
            for parameter, kind in sampler.requires.items()
            if (name := getattr(params, parameter)) is not None and kind in self._kinds
            for warning in self._kinds[kind].warnings(name, block_length, gen_length)
        ]


def _find_sampler(name: str | None) -> Sampler[Any]:
    try:
        return get_sampler(name or "threshold")
    except UnknownSamplerError as error:
        raise ParameterError("base", str(error), "unknown_sampler") from None


DEFAULT = ResourceTable()
"""Table for use without a server: contains rules only."""


def bound(sampler: Sampler[Any], params: SamplerParams, resources: ResourceTable | None = None) -> Sampler[Any]:
    """The sampler with its auxiliaries. Raises ParameterError if one is missing, SamplerError if the sampler fails."""

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
