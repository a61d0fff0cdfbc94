"""The stage of group relative policy optimisation: policy gradient on fresh rollouts."""

import copy
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from policies.network.policy_network import UnmaskingPolicy
from policies.tasks import Problem
from policies.training.actors import ExpertMixture, PolicyActor, RuleActor
from policies.training.decoding_setup import DecodingSetup
from policies.training.gradient import Batch, gradient_steps
from policies.training.recipe import Grpo
from policies.training.rewards import DeviationScale, group_advantage, path_likelihood, reward
from policies.training.rollout import Actor, Rollout
from policies.training.speeds import speed_of
from policies.training.training_run import TrainingRun
from samplers.rules.threshold import Threshold


def new_optimizer(network: UnmaskingPolicy, stage: Grpo) -> torch.optim.AdamW:
    """A fresh optimizer of the network's weights."""
    return torch.optim.AdamW(
        network.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay
    )


@dataclass
class GrpoState:
    """State between the updates of a stage, kept in checkpoints.

    Attributes:
        reference: copy of the policy from the stage's start, if divergence from it is penalised.
        update, updates_done: updates done by the stage, and by the whole run.
    """

    optimizer: torch.optim.AdamW | None = None
    reference: UnmaskingPolicy | None = None
    scale: DeviationScale = field(default_factory=DeviationScale)
    update: int = 0
    updates_done: int = 0

    def begin(self, network: UnmaskingPolicy, stage: Grpo) -> None:
        """Start a stage, unless it was started before."""
        if self.optimizer is not None:
            return
        self.optimizer = new_optimizer(network, stage)
        self.scale = DeviationScale()
        if stage.kl:
            self.reference = copy.deepcopy(network).requires_grad_(False)

    def end(self) -> None:
        """Drop what the next stage must not inherit."""
        self.optimizer = self.reference = None
        self.update = 0


@dataclass
class GrpoStage:
    """One GRPO stage of a run, the stage of that number in its recipe."""

    run: TrainingRun
    number: int
    stage: Grpo
    state: GrpoState

    def work(self, checkpoint: Callable[[], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Do the updates that are left; yields a line for each.

        Args:
            checkpoint: called after every `save_every` updates but the last; what it returns goes into the line.
        """
        state, stage = self.state, self.stage
        state.begin(self.run.network, stage)
        while state.update < stage.updates:
            line = self.update()
            state.update += 1
            state.updates_done += 1
            if state.update % self.run.recipe.save_every == 0 and state.update < stage.updates:
                line |= checkpoint()
            yield line | {"update": state.update, "of": stage.updates}

    def update(self) -> dict[str, Any]:
        """Do one rollout batch and its gradient steps; returns metrics.

        Raises FloatingPointError if the gradient is not finite.
        """
        run, stage, optimizer = self.run, self.stage, self.state.optimizer
        assert optimizer is not None
        setup = run.setups[self.state.update % len(run.setups)]
        groups = self._draw_groups(setup)
        members = stage.group + len(stage.experts)
        alpha = torch.tensor([group.alpha for group in groups])
        each_alpha = alpha.repeat_interleave(members)
        speed = speed_of(each_alpha, stage.alphas) if run.recipe.policy.takes_speed else None
        expert = (torch.arange(len(groups) * members) % members - stage.group).clamp(min=-1)
        began = time.monotonic()
        found = run.rollout(
            setup,
            [group.problem for group in groups for _ in range(members)],
            self._actor(speed, expert),
            [seed for group in groups for seed in group.seeds],
            allow_empty=stage.allow_empty,
        )
        rolled = time.monotonic() - began
        worth = self._worth(found, each_alpha)
        advantage = group_advantage(worth.view(len(groups), members))
        alive = (advantage != 0).any(dim=1)
        batch = Batch(found, self._scaled(advantage, alpha).flatten(), expert >= 0, speed)
        for parameters in optimizer.param_groups:
            parameters["lr"] = self._learning_rate()
        try:
            metrics = gradient_steps(run.network, self.state.reference, optimizer, stage, batch, run.world)
        except FloatingPointError as error:
            raise FloatingPointError(f"stage {self.number}, update {self.state.update}: {error}") from None
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
        return run.world.mean(metrics)

    def _draw_groups(self, setup: DecodingSetup) -> "list[_Group]":
        """This process's share of the update's groups."""
        run, stage = self.run, self.stage
        rng = random.Random(f"{run.recipe.seed}/{self.number}/{self.state.update}/groups")
        members = stage.group + len(stage.experts)
        groups = [
            _Group(
                setup.task.draw(rng, "train"), rng.choice(stage.alphas), [rng.getrandbits(31) for _ in range(members)]
            )
            for _ in range(stage.prompts)
        ]
        return groups[run.world.rank :: run.world.size]

    def _actor(self, speed: Tensor | None, expert: Tensor) -> Actor:
        stage = self.stage
        policy = PolicyActor(self.run.network, speed, allow_empty=stage.allow_empty)
        threshold = Threshold()
        rules = [
            RuleActor(threshold, Threshold.Params(threshold=value), stage.expert_block_length)
            for value in stage.experts
        ]
        return ExpertMixture(policy, rules, expert) if rules else policy

    def _worth(self, found: Rollout, alpha: Tensor) -> Tensor:
        """Reward of each generation, [rollouts]."""
        worth = reward(found.correct, found.forwards, found.budget, alpha, self.stage.form)
        if not self.stage.likelihood:
            return worth
        records = found.records
        assert records is not None
        likelihood = path_likelihood(records.committed, records.confidence, records.row, len(found.correct))
        return worth + self.stage.likelihood * likelihood

    def _scaled(self, advantage: Tensor, alpha: Tensor) -> Tensor:
        """Advantages [groups, members] over the running deviation of their alpha, where the stage says so."""
        if not self.stage.scale_by_deviation:
            return advantage
        world = self.run.world
        return self.state.scale.scale(world.gather(advantage), world.gather(alpha))[world.rank :: world.size]

    def _learning_rate(self) -> float:
        stage, update = self.stage, self.state.update
        warm = min(1.0, (update + 1) / stage.warmup) if stage.warmup else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * update / stage.updates)) if stage.schedule == "cosine" else 1.0
        return stage.learning_rate * warm * falling


@dataclass(frozen=True)
class _Group:
    """Generations of one problem, compared with each other; one seed for each."""

    problem: Problem
    alpha: float
    seeds: list[int]
