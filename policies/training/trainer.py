"""Training of a policy: the stages of a recipe in order, resumable to the bit on one kind of processor."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from policies.model_under_test import ModelUnderTest
from policies.network.policy_network import UnmaskingPolicy
from policies.serving.checkpoint import Origin, PolicyCard, TrainedOn, save_policy
from policies.training.checkpointing import RunState
from policies.training.collect import collect
from policies.training.collected import CollectedRuns
from policies.training.data_parallel import DataParallel
from policies.training.decoding_setup import setups_of
from policies.training.fit import fit_stage
from policies.training.grpo import GrpoStage, GrpoState, new_optimizer
from policies.training.held_out import alphas_of, check
from policies.training.preflight import check_model, check_problems
from policies.training.recipe import Collect, Fit, Grpo, PolicyRecipe, Shift, Stage
from policies.training.shift import shift
from policies.training.training_run import TrainingRun

Report = Callable[[dict[str, Any]], None]


@dataclass
class PolicyTrainer:
    """One run in one folder: `policy.*` (the best so far), `state.safetensors`, `runs-N.safetensors`.

    The constructor raises ValueError if recipe, tasks and model do not fit together. Set `stopping`, and `run` ends
    after the current piece of work.

    Args:
        content: the recipe as it was read.
        origin: the frozen model, as the policy's card will name it.
        report: called with every line of metrics.
    """

    recipe: PolicyRecipe
    content: dict[str, Any]
    model: ModelUnderTest
    origin: Origin
    out: Path
    world: DataParallel = field(default_factory=DataParallel)
    report: Report = lambda line: None
    stage: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    stopping: bool = False
    grpo: GrpoState = field(default_factory=GrpoState)

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        check_problems(self.recipe)
        for stage in self.recipe.stage:
            if isinstance(stage, Grpo) and stage.prompts % self.world.size:
                raise ValueError(f"{stage.prompts} prompts do not share out evenly over {self.world.size} processes")
        self.network = UnmaskingPolicy(self.recipe.policy)
        setups = setups_of(self.recipe)
        check_model(self.recipe, setups, self.model)
        collected = CollectedRuns(self.recipe, self.out)
        self.training_run = TrainingRun(self.recipe, self.model, self.network, setups, collected, self.world)
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def update(self) -> int:
        """Updates that the current stage has done, if it is one of GRPO."""
        return self.grpo.update

    @property
    def state_file(self) -> Path:
        return self.out / "state.safetensors"

    def run(self) -> None:
        """Work through the stages that are left. Ends early if `stopping` is set; a restart resumes from the last
        checkpoint.
        """
        for number, stage in enumerate(self.recipe.stage):
            if number != self.stage:
                continue
            work = self._work(number, stage)
            began = time.monotonic()
            for line in work:
                self.seconds += time.monotonic() - began
                self.report({"stage": number, "kind": stage.kind, "seconds": round(self.seconds, 1), **line})
                if self.stopping:
                    return
                began = time.monotonic()
            self.seconds += time.monotonic() - began
            self.stage = number + 1
            self.grpo.end()
            if checked := self._checkpoint(stage):
                self.report({"stage": number, "kind": "check", "seconds": round(self.seconds, 1), **checked})

    def _work(self, number: int, stage: Stage) -> Iterator[dict[str, Any]]:
        match stage:
            case Collect():
                return collect(self.training_run, number, stage)
            case Fit():
                return fit_stage(self.training_run, number, stage)
            case Shift():
                return shift(self.training_run, stage)
            case Grpo():
                return GrpoStage(self.training_run, number, stage, self.grpo).work(lambda: self._checkpoint(stage))

    def _checkpoint(self, stage: Stage) -> dict[str, Any]:
        """Compare the policy on held-out problems, export it if it is the best so far, and save the state."""
        line: dict[str, Any] = {}
        if self.world.first and not isinstance(stage, Collect):
            line = check(self.training_run) if self.recipe.check else {}
            value = line.get("check/reward", 0.0)
            if not self.recipe.check or value > self.best:
                self.best = value
                self.export()
        self.save()
        return line

    def save(self) -> None:
        """Write the run's state; a kill at any point leaves the old file or the new one."""
        if not self.world.first:
            return
        numbers = {
            "stage": self.stage,
            "update": self.grpo.update,
            "seconds": self.seconds,
            "updates_done": self.grpo.updates_done,
            "best": self.best,
            "scale": list(self.grpo.scale.state.items()),
            "model_digest": self.origin.model_digest,
        }
        RunState(self.network, self.grpo.reference, self.grpo.optimizer, numbers).save(self.state_file, self.recipe)

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one.

        Raises ValueError if it is of another recipe or model, or if runs that a later stage fits to are gone.
        """
        if not self.state_file.exists():
            return False

        def optimizer(number: int) -> torch.optim.AdamW:
            stage = self.recipe.stage[number]
            assert isinstance(stage, Grpo)
            return new_optimizer(self.network, stage)

        found = RunState.load(self.state_file, self.recipe, self.network, optimizer)
        numbers, grpo = found.numbers, self.grpo
        if numbers.get("model_digest", self.origin.model_digest) != self.origin.model_digest:
            raise ValueError(f"{self.state_file} belongs to another model; choose another --out or delete it")
        self.stage, self.seconds, self.best = numbers["stage"], numbers["seconds"], numbers["best"]
        grpo.reference, grpo.optimizer = found.reference, found.optimizer
        grpo.update, grpo.updates_done = numbers["update"], numbers["updates_done"]
        grpo.scale.state = dict(numbers["scale"])
        self.training_run.collected.require(self.stage)
        return True

    def export(self) -> None:
        """Write the current policy to the run's folder, ready to be served."""
        setups = self.training_run.setups
        trained = TrainedOn(
            **self.origin.model_dump(),
            task=self.recipe.tasks,
            gen_lengths=tuple(dict.fromkeys(setup.gen_length for setup in setups)),
            block_lengths=tuple(dict.fromkeys(setup.block_length for setup in setups)),
            alphas=alphas_of(self.recipe),
            seed=self.recipe.seed,
            updates=self.grpo.updates_done,
            seconds=round(self.seconds, 1),
        )
        card = PolicyCard(config=self.recipe.policy, trained_on=trained, recipe=self.content)
        save_policy(self.network, card, self.out)
