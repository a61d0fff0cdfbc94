"""Policies compared on held-out problems, so that the best checkpoint is kept."""

from typing import Any

from policies.network.policy_network import LoadedPolicy
from policies.training.actors import RuleActor
from policies.training.preflight import CHECK_SEED
from policies.training.recipe import Grpo, PolicyRecipe
from policies.training.rewards import reward
from policies.training.speeds import speed_of
from policies.training.training_run import TrainingRun
from samplers.learned.policy import Policy, PolicyParams


def alphas_of(recipe: PolicyRecipe) -> tuple[float, ...]:
    """The alphas that a recipe's policy is judged by: those of its last GRPO stage."""
    stages = [stage for stage in recipe.stage if isinstance(stage, Grpo)]
    return stages[-1].alphas if stages else (1.0,)


def check(run: TrainingRun) -> dict[str, Any]:
    """Accuracy and tokens per forward of every setup and alpha, and under `check/reward` the mean reward.

    Problems are held out, and commits drawn as at serving.
    """
    count, alphas = run.recipe.check, alphas_of(run.recipe)
    sampler = Policy(LoadedPolicy(run.network))
    line: dict[str, Any] = {}
    value = 0.0
    for setup in run.setups:
        problems = setup.task.problems(count, CHECK_SEED, "heldout")
        for alpha in alphas:
            speed = float(speed_of(alpha, alphas)) if run.recipe.policy.takes_speed else None
            actor = RuleActor(sampler, PolicyParams(speed=speed))
            found = run.rollout(setup, problems, actor, range(count))
            worth = reward(found.correct, found.forwards, found.budget, alpha).mean()
            value += float(worth) / len(run.setups) / len(alphas)
            line[f"check/{setup}/{alpha:g}"] = [
                round(float(found.correct.mean()), 4),
                round(float(found.tokens.sum() / found.forwards.sum()), 3),
            ]
    return line | {"check/reward": value}
