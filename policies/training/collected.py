"""Runs that the stages of a recipe collected, in memory and in the run's folder."""

from dataclasses import dataclass, field
from pathlib import Path

from policies.training.recipe import Collect, Fit, PolicyRecipe
from policies.training.runs import Runs


@dataclass
class CollectedRuns:
    """Runs by the number of the stage that collected them, one file each."""

    recipe: PolicyRecipe
    folder: Path
    _runs: dict[int, Runs] = field(default_factory=dict)

    def file(self, number: int) -> Path:
        """Where the runs of a stage are kept."""
        return self.folder / f"runs-{number}.safetensors"

    def add(self, number: int, runs: Runs, *, write: bool) -> None:
        """Keep the runs of a stage."""
        self._runs[number] = runs
        if write:
            runs.save(self.file(number))

    def before(self, number: int) -> Runs:
        """All runs that stages before this one collected, in this session or an earlier one."""
        for earlier, stage in enumerate(self.recipe.stage[:number]):
            if isinstance(stage, Collect) and earlier not in self._runs:
                self._runs[earlier] = Runs.load(self.file(earlier))
        return Runs.join([self._runs[earlier] for earlier in sorted(self._runs)])

    def require(self, number: int) -> None:
        """Raise ValueError if runs of stages before this one are gone that a stage from this one on fits to."""
        last_fit = max((i for i, stage in enumerate(self.recipe.stage) if isinstance(stage, Fit)), default=-1)
        if last_fit < number:
            return
        for earlier, stage in enumerate(self.recipe.stage[:number]):
            if isinstance(stage, Collect) and not self.file(earlier).is_file():
                raise ValueError(f"{self.file(earlier)} is gone, and stage {last_fit} fits to it: start anew")
