"""The stage that collects runs: careful ones with bold steps, or by the policy itself at random cuts."""

import random
from collections.abc import Iterator
from typing import Any

import torch

from policies.training.actors import Explorer, PolicyActor
from policies.training.decoding_setup import DecodingSetup
from policies.training.recipe import Collect, Fit
from policies.training.rollout import Actor, Rollout
from policies.training.runs import Runs
from policies.training.training_run import TrainingRun

CHUNK = 4
"""Number of batches in one rollout; setups take turns by rollouts."""
TEMPERATURES = (0.3, 1.0, 2.0)


def collect(run: TrainingRun, number: int, stage: Collect) -> Iterator[dict[str, Any]]:
    """Collect `stage.runs` runs for later stages to fit to; yields a line for each rollout."""
    ask_oracle = any(isinstance(later, Fit) and later.label == "oracle" for later in run.recipe.stage)
    rollouts: list[Rollout] = []
    done = 0
    while done < stage.runs:
        chunk = len(rollouts)
        count = min(CHUNK * run.recipe.batch, stage.runs - done)
        setup = run.setups[chunk % len(run.setups)]
        rng = random.Random(f"{run.recipe.seed}/{number}/collect/{chunk}")
        problems = [setup.task.draw(rng, "train") for _ in range(count)]
        seeds = [rng.getrandbits(31) for _ in range(count)]
        found = run.rollout(setup, problems, _actor(run, stage, setup, rng, count), seeds, ask_oracle=ask_oracle)
        rollouts.append(found)
        done += count
        yield {
            "runs": done,
            "of": stage.runs,
            "right": float(found.correct.mean()),
            "tpf": float(found.tokens.sum() / found.forwards.sum()),
        }
    run.collected.add(number, Runs.of(rollouts), write=run.world.first)


def _actor(run: TrainingRun, stage: Collect, setup: DecodingSetup, rng: random.Random, count: int) -> Actor:
    if stage.by == "explorer":
        return Explorer(count, rng.getrandbits(31), stage.always, stage.thresholds, setup.blocks)
    shift = torch.tensor([rng.uniform(0, stage.shifts) for _ in range(count)])
    temperature = torch.tensor([rng.choice(TEMPERATURES) for _ in range(count)])
    speed = torch.full((count,), 0.5) if run.network.config.takes_speed else None
    return PolicyActor(run.network, speed, shift, temperature)
