"""Distributions that tests put on the path, as an installer would; none that happens to be installed beside Unmask."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoints, distributions
from pathlib import Path

import pytest

from policies.tasks import registry as tasks
from samplers import plugins
from samplers import registry as samplers

SAMPLER = '''
from samplers import Sampler, SamplerParams, Selection

class LeftToRight(Sampler):
    """Commit the leftmost candidate."""
    name = "left_to_right"
    def select(self, step):
        first = step.candidate.int().argmax(dim=1, keepdim=True)
        return Selection(step.candidate & (first == first.new_tensor(range(step.candidate.shape[1]))))
'''


class Installed:
    """Adds distributions in a folder, each with one module and what its entry points say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, module: str, source: str, group: str, **entries: str) -> None:
        """Install `module`; entries are names and the attributes of the module that they stand for."""
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
        sys.modules.pop(module, None)
        forget()

    def sampler(self, source: str = SAMPLER, *, entry: str = "left_to_right", attribute: str = "LeftToRight") -> None:
        """Install a sampler as distribution `third_party`."""
        self.add("third_party", source, "unmask.samplers", **{entry: attribute})

    def found(self, *, group: str) -> EntryPoints:
        """What `importlib.metadata.entry_points` says where nothing else is installed."""
        here = distributions(path=[str(self.folder)])
        return EntryPoints(entry for each in here for entry in each.entry_points if entry.group == group)


def forget() -> None:
    """Let the registries look anew."""
    for cached in (
        samplers._registry,
        samplers._plugins,
        samplers._descriptions,
        tasks._registry,
        tasks._third_parties,
    ):
        cached.cache_clear()


def look_at(entry_points: Callable[..., EntryPoints], patching: pytest.MonkeyPatch) -> None:
    """Let the registries see these entry points only."""
    patching.setattr(plugins, "entry_points", entry_points)
    patching.setattr(tasks, "entry_points", entry_points)
    forget()
