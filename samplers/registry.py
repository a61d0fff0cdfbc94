"""Name -> sampler: ours, and third parties' through the entry point group `unmask.samplers`."""

from functools import cache
from importlib.metadata import entry_points

from samplers.base import Sampler
from samplers.credit import Credit
from samplers.diffusion_gemma import DiffusionGemma
from samplers.dream import Dream
from samplers.edit import Edit
from samplers.entropy import Entropy
from samplers.entropy_bound import EntropyBound
from samplers.factor import Factor
from samplers.hierarchy import Hierarchy, HierarchyRemask
from samplers.margin import Margin
from samplers.policy import Policy
from samplers.random import Random
from samplers.sequential import Sequential
from samplers.threshold import Threshold
from samplers.topk import TopK

_OURS: tuple[type[Sampler], ...] = (
    Random,
    Sequential,
    TopK,
    Threshold,
    Factor,
    Margin,
    Entropy,
    EntropyBound,
    Dream,
    Hierarchy,
    HierarchyRemask,
    Credit,
    Edit,
    DiffusionGemma,
    Policy,
)


class UnknownSamplerError(KeyError):
    """No sampler of that name; the message lists those there are."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def _registry() -> dict[str, Sampler]:
    found: dict[str, Sampler] = {sampler.name: sampler() for sampler in _OURS}
    for entry in entry_points(group="unmask.samplers"):
        sampler = entry.load()
        if not (isinstance(sampler, type) and issubclass(sampler, Sampler)):
            raise TypeError(f"entry point {entry.name!r} in group unmask.samplers is not a Sampler class: {sampler!r}")
        if sampler.name != entry.name:
            raise ValueError(
                f"entry point {entry.name!r} in group unmask.samplers names a sampler called {sampler.name!r}"
            )
        if entry.name in found:
            raise ValueError(f"entry point {entry.name!r} in group unmask.samplers takes a name that is already in use")
        found[entry.name] = sampler()
    return found


def list_samplers() -> list[Sampler]:
    """All samplers."""
    return list(_registry().values())


def get_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises UnknownSamplerError."""
    found = _registry().get(name)
    if found is None:
        raise UnknownSamplerError(f"unknown sampler {name!r}; choose from {', '.join(_registry())}")
    return found
