"""Train a policy: the stages of a recipe, one after the other, resumable to the bit on one kind of processor."""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policies.model_under_test import ModelUnderTest
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy
from policies.serving.checkpoint import Origin, PolicyCard, TrainedOn, save_policy
from policies.tasks import Problem
from policies.training.actors import ExpertMixture, Explorer, PolicyActor, RuleActor
from policies.training.checkpointing import RunState
from policies.training.data_parallel import DataParallel
from policies.training.decoding_setup import DecodingSetup, settings_of
from policies.training.fit import Runs, fit
from policies.training.gradient import Batch, gradient_steps
from policies.training.preflight import CHECK_SEED, check_model, check_problems
from policies.training.recipe import Collect, Fit, Grpo, PolicyRecipe, Shift
from policies.training.rewards import DeviationScale, group_advantage, path_likelihood, reward
from policies.training.rollout import Actor, Rollout, rollout
from samplers.learned.policy import Policy, PolicyParams
from samplers.rules.threshold import Threshold

Report = Callable[[dict[str, Any]], None]


def speed_of(alpha: Tensor | float, alphas: tuple[float, ...]) -> Tensor:
    """The speed that stands for one of a recipe's alphas: evenly from 0, the smallest, to 1, the largest."""
    known = torch.tensor(sorted(set(alphas)))
    return torch.searchsorted(known, torch.as_tensor(alpha)) / max(1, len(known) - 1)


@dataclass
class PolicyTrainer:
    """One run in one folder: `policy.*` (the best so far), `state.safetensors`, `metrics.jsonl`.

    Raises ValueError when it is made if recipe, tasks and model do not go together: nothing of that is found later.

    Args:
        origin: what the policy is trained on, as its card will say it.
        content: the recipe as it was read.
        report: gets every line of metrics.

    Set `stopping` and `run` ends after the current piece of work.
    """

    recipe: PolicyRecipe
    content: dict[str, Any]
    model: ModelUnderTest
    origin: Origin
    out: Path
    world: DataParallel = field(default_factory=DataParallel)
    report: Report = lambda line: None
    stage: int = 0
    update: int = 0
    seconds: float = 0.0
    updates_done: int = 0
    best: float = -math.inf
    stopping: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        check_problems(self.recipe)
        for stage in self.recipe.stage:
            if isinstance(stage, Grpo) and stage.prompts % self.world.size:
                raise ValueError(f"{stage.prompts} prompts do not share out evenly over {self.world.size} processes")
        self.network = UnmaskingPolicy(self.recipe.policy)
        self.settings = settings_of(self.recipe)
        check_model(self.recipe, self.settings, self.model)
        self.optimizer: torch.optim.AdamW | None = None
        self.reference: UnmaskingPolicy | None = None
        self.scale = DeviationScale()
        self.runs: dict[int, Runs] = {}
        self.out.mkdir(parents=True, exist_ok=True)

    # State

    @property
    def state_file(self) -> Path:
        return self.out / "state.safetensors"

    def save(self) -> None:
        """Write the run's state; a kill at any point leaves the old file or the new one."""
        if not self.world.first:
            return
        numbers = {
            "stage": self.stage,
            "update": self.update,
            "seconds": self.seconds,
            "updates_done": self.updates_done,
            "best": self.best,
            "scale": list(self.scale.state.items()),
            "model_digest": self.origin.model_digest,
        }
        RunState(self.network, self.reference, self.optimizer, numbers).save(self.state_file, self.recipe)

    def resume(self) -> bool:
        """Continue from the folder's state, if there is one.

        Raises ValueError if it is of another recipe or model, or if runs that a later stage fits to are gone.
        """
        if not self.state_file.exists():
            return False

        def optimizer(number: int) -> torch.optim.AdamW:
            stage = self.recipe.stage[number]
            assert isinstance(stage, Grpo)
            return self._adamw(stage)

        found = RunState.load(self.state_file, self.recipe, self.network, optimizer)
        self.reference, self.optimizer, numbers = found.reference, found.optimizer, found.numbers
        if numbers.get("model_digest", self.origin.model_digest) != self.origin.model_digest:
            raise ValueError(f"{self.state_file} belongs to another model; choose another --out or delete it")
        self.stage, self.update = numbers["stage"], numbers["update"]
        self._require_runs()
        self.seconds, self.updates_done, self.best = numbers["seconds"], numbers["updates_done"], numbers["best"]
        self.scale.state = dict(numbers["scale"])
        return True

    # The run

    def run(self) -> None:
        """Work off the stages. Ends early, with the state saved, when `stopping` is set."""
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
            self.stage, self.update = number + 1, 0
            self.optimizer = self.reference = None
            if checked := self._checkpoint(stage):
                self.report({"stage": number, "kind": "check", "seconds": round(self.seconds, 1), **checked})

    def _work(self, number: int, stage: Collect | Fit | Shift | Grpo) -> Iterator[dict[str, Any]]:
        match stage:
            case Collect():
                return self._collect(number, stage)
            case Fit():
                return self._fit(number, stage)
            case Shift():
                return self._shift(stage)
            case Grpo():
                return self._grpo(number, stage)

    def _runs_file(self, number: int) -> Path:
        return self.out / f"runs-{number}.safetensors"

    def _collect(self, number: int, stage: Collect) -> Iterator[dict[str, Any]]:
        asked = any(isinstance(later, Fit) and later.label == "oracle" for later in self.recipe.stage)
        rollouts: list[Rollout] = []
        done = chunk = 0
        size = 4 * self.recipe.batch
        while done < stage.runs:
            count = min(size, stage.runs - done)
            key = f"{number}/collect/{chunk}"
            setting = self.settings[chunk % len(self.settings)]
            rng = random.Random(f"{self.recipe.seed}/{key}")
            problems = [setting.task.draw(rng, "train") for _ in range(count)]
            seeds = [rng.getrandbits(31) for _ in range(count)]
            if stage.by == "policy":
                shift = torch.tensor([rng.uniform(0, stage.shifts) for _ in range(count)])
                temperature = torch.tensor([rng.choice((0.3, 1.0, 2.0)) for _ in range(count)])
                speed = torch.full((count,), 0.5) if self.network.config.takes_speed else None
                chooser: Actor = PolicyActor(self.network, speed, shift, temperature)
            else:
                chooser = Explorer(count, rng.getrandbits(31), stage.always, stage.thresholds, setting.blocks)
            found = self._rollout(setting, problems, chooser, seeds, ask_oracle=asked)
            rollouts.append(found)
            done += count
            chunk += 1
            yield {
                "runs": done,
                "of": stage.runs,
                "right": float(found.correct.mean()),
                "tpf": float(found.tokens.sum() / found.forwards.sum()),
            }
        self.runs[number] = Runs.of(rollouts)
        if self.world.first:
            self.runs[number].save(self._runs_file(number))

    def _require_runs(self) -> None:
        last_fit = max((i for i, stage in enumerate(self.recipe.stage) if isinstance(stage, Fit)), default=-1)
        if last_fit < self.stage:
            return
        for number, stage in enumerate(self.recipe.stage[: self.stage]):
            if isinstance(stage, Collect) and not self._runs_file(number).is_file():
                raise ValueError(f"{self._runs_file(number)} is gone, and stage {last_fit} fits to it: start anew")

    def _all_runs(self, number: int) -> Runs:
        """What the stages before this one collected, in this session or an earlier one."""
        for earlier, stage in enumerate(self.recipe.stage[:number]):
            if isinstance(stage, Collect) and earlier not in self.runs:
                self.runs[earlier] = Runs.load(self._runs_file(earlier))
        return Runs.join([self.runs[earlier] for earlier in sorted(self.runs)])

    def _rollout(
        self,
        setting: DecodingSetup,
        problems: list[Problem],
        chooser: Actor,
        seeds: list[int],
        *,
        allow_empty: bool = False,
        ask_oracle: bool = False,
    ) -> Rollout:
        return rollout(
            self.model,
            setting.task,
            problems,
            chooser,
            gen_length=setting.gen_length,
            block_length=setting.block_length,
            seeds=seeds,
            batch=self.recipe.batch,
            prompt_length=self.recipe.prompt_length,
            record=self.recipe.policy,
            allow_empty=allow_empty,
            ask_oracle=ask_oracle,
        )

    def _fit(self, number: int, stage: Fit) -> Iterator[dict[str, Any]]:
        runs = self._all_runs(number)
        losses: list[float] = []
        seed = random.Random(f"{self.recipe.seed}/{number}/fit").getrandbits(31)
        for step, loss in enumerate(
            fit(
                self.network,
                runs,
                label=stage.label,
                steps=stage.steps,
                batch=stage.batch,
                learning_rate=stage.learning_rate,
                seed=seed,
                threshold=stage.threshold,
            ),
            1,
        ):
            losses.append(loss)
            if step % 50 == 0 or step == stage.steps:
                yield {"step": step, "of": stage.steps, "loss": sum(losses) / len(losses)}
                losses.clear()

    def _shift(self, stage: Shift) -> Iterator[dict[str, Any]]:
        with torch.no_grad():
            head = self.network.head
            head.weight.mul_(stage.scale)
            head.bias.sub_(math.log(stage.cut / (1 - stage.cut))).mul_(stage.scale)
        yield {"cut": stage.cut, "scale": stage.scale}

    def _adamw(self, stage: Grpo) -> torch.optim.AdamW:
        self.network.train().requires_grad_(True)
        return torch.optim.AdamW(
            self.network.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay
        )

    def _grpo(self, number: int, stage: Grpo) -> Iterator[dict[str, Any]]:
        if self.optimizer is None:
            self.optimizer = self._adamw(stage)
            self.scale = DeviationScale()
            if stage.kl:
                self.reference = copy.deepcopy(self.network).requires_grad_(False).eval()
        while self.update < stage.updates:
            line = self.grpo_update(number, stage)
            self.update += 1
            self.updates_done += 1
            if self.update % self.recipe.save_every == 0 and self.update < stage.updates:
                line |= self._checkpoint(stage)
            yield line | {"update": self.update, "of": stage.updates}

    def _rate(self, stage: Grpo) -> float:
        warm = min(1.0, (self.update + 1) / stage.warmup) if stage.warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * self.update / stage.updates)) if stage.schedule == "cosine" else 1.0
        return stage.learning_rate * warm * falling

    def grpo_update(self, number: int, stage: Grpo) -> dict[str, Any]:
        """One rollout batch and its gradient steps; what happened."""
        assert self.optimizer is not None
        config = self.recipe.policy
        members = stage.group + len(stage.experts)
        key = f"{number}/{self.update}"
        rng = random.Random(f"{self.recipe.seed}/{key}/groups")
        setting = self.settings[self.update % len(self.settings)]
        groups = [
            (setting.task.draw(rng, "train"), rng.choice(stage.alphas), [rng.getrandbits(31) for _ in range(members)])
            for _ in range(stage.prompts)
        ]
        mine = groups[self.world.rank :: self.world.size]
        alpha = torch.tensor([alpha for _, alpha, _ in mine])
        each_alpha = alpha.repeat_interleave(members)
        speed = speed_of(each_alpha, stage.alphas) if config.takes_speed else None
        place = torch.arange(len(mine) * members) % members
        expert = (place - stage.group).clamp(min=-1)
        policy = PolicyActor(self.network, speed, allow_empty=stage.allow_empty)
        self.network.train().requires_grad_(True)
        threshold = Threshold()
        rules = [
            RuleActor(threshold, Threshold.Params(threshold=value), stage.expert_block_length)
            for value in stage.experts
        ]
        began = time.monotonic()
        found = self._rollout(
            setting,
            [problem for problem, _, _ in mine for _ in range(members)],
            ExpertMixture(policy, rules, expert) if rules else policy,
            [seed for _, _, seeds in mine for seed in seeds],
            allow_empty=stage.allow_empty,
        )
        rolled = time.monotonic() - began
        worth = reward(found.correct, found.forwards, found.budget, each_alpha, stage.form)
        if stage.likelihood:
            worth = worth + stage.likelihood * self._path_likelihood(found)
        advantage = group_advantage(worth.view(len(mine), members))
        alive = (advantage != 0).any(dim=1)
        if stage.scale_by_deviation:
            gathered, alphas = self.world.gather(advantage), self.world.gather(alpha)
            scaled = self.scale.scale(gathered, alphas)
            advantage = scaled[self.world.rank :: self.world.size]
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._rate(stage)
        batch = Batch(found, advantage.flatten(), expert >= 0, speed)
        try:
            metrics = gradient_steps(self.network, self.reference, self.optimizer, stage, batch, self.world)
        except FloatingPointError as error:
            raise FloatingPointError(f"stage {number}, update {self.update}: {error}") from None
        own = expert < 0
        metrics |= {
            "reward": float(worth[own].mean()),
            "right": float(found.correct[own].mean()),
            "tpf": float(found.tokens[own].sum() / found.forwards[own].sum()),
            "forwards": float(found.forwards[own].float().mean()),
            "alive": float(alive.float().mean()),
            "rollout_seconds": round(rolled, 2),
            "update_seconds": round(time.monotonic() - began - rolled, 2),
        }
        return self.world.mean(metrics)

    def _path_likelihood(self, found: Rollout) -> Tensor:
        records = found.records
        assert records is not None
        return path_likelihood(records.committed, records.confidence, records.row, len(found.correct))

    # Checkpoints

    def _checkpoint(self, stage: Collect | Fit | Shift | Grpo) -> dict[str, Any]:
        """Save the state; compare the policy on held-out problems and keep it if it is the best so far."""
        line: dict[str, Any] = {}
        if self.world.first and not isinstance(stage, Collect):
            line = self._compare()
        self.save()
        return line

    def _alphas(self) -> tuple[float, ...]:
        stages = [stage for stage in self.recipe.stage if isinstance(stage, Grpo)]
        return stages[-1].alphas if stages else (1.0,)

    def _compare(self) -> dict[str, Any]:
        """Mean reward over the recipe's alphas on held-out problems, drawn as at serving."""
        count = self.recipe.check
        value = 0.0
        line: dict[str, Any] = {}
        if count:
            sampler = Policy(LoadedPolicy(copy.deepcopy(self.network)))
            for setting in self.settings:
                problems = setting.task.problems(count, CHECK_SEED, "heldout")
                for alpha in self._alphas():
                    speed = None
                    if self.recipe.policy.takes_speed:
                        speed = float(speed_of(alpha, self._alphas()))
                    chooser = RuleActor(sampler, PolicyParams(speed=speed))
                    found = self._rollout(setting, problems, chooser, list(range(count)))
                    worth = reward(found.correct, found.forwards, found.budget, alpha).mean()
                    value += float(worth) / len(self.settings) / len(self._alphas())
                    line[f"check/{setting}/{alpha:g}"] = [
                        round(float(found.correct.mean()), 4),
                        round(float(found.tokens.sum() / found.forwards.sum()), 3),
                    ]
            line["check/reward"] = value
        if not count or value > self.best:
            self.best = value
            self.export()
        return line

    def export(self) -> None:
        """Write the policy as it is now as a folder that can be served."""
        trained = TrainedOn(
            **self.origin.model_dump(),
            task=self.recipe.tasks,
            gen_lengths=tuple(dict.fromkeys(setting.gen_length for setting in self.settings)),
            block_lengths=tuple(dict.fromkeys(setting.block_length for setting in self.settings)),
            alphas=self._alphas(),
            seed=self.recipe.seed,
            updates=self.updates_done,
            seconds=round(self.seconds, 1),
        )
        card = PolicyCard(config=self.recipe.policy, trained_on=trained, recipe=self.content)
        save_policy(self.network, card, self.out)
