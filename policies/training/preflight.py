"""Checks of a policy's training before its first forward pass."""

import random
from collections.abc import Iterator

from policies.model_under_test import ModelUnderTest
from policies.tasks import Problem, Task
from policies.training.decoding_setup import DecodingSetup, setups_of
from policies.training.recipe import PolicyRecipe
from samplers import Canvas
from samplers.learned.policy import Policy

CHECK_SEED = 11
"""Seed of the held-out problems that checkpoints are chosen on; published figures must come from other seeds."""

_DRAWN = 64
"""Number of problems whose prompts are measured if a task generates them without end."""


def check_problems(recipe: PolicyRecipe) -> None:
    """Raise ValueError if a task of the recipe has too few problems for it, or none."""
    for task in {setup.task.name: setup.task for setup in setups_of(recipe)}.values():
        task.draw(random.Random(0), "train")
        try:
            task.problems(recipe.check, CHECK_SEED, "heldout")
        except ValueError as error:
            raise ValueError(f"check = {recipe.check}: {error}; check = 0 keeps the last policy unchecked") from None


def check_model(recipe: PolicyRecipe, setups: list[DecodingSetup], model: ModelUnderTest) -> None:
    """Raise ValueError if the model cannot be decoded as the recipe says, or prompts do not fit its context."""
    if incompatibility := Policy().incompatibility(model.pattern):
        raise ValueError(incompatibility)
    for setup in setups:
        try:
            Canvas.blank([], setup.gen_length, model.mask_id, setup.block_length, pattern=model.pattern)
        except ValueError as error:
            raise ValueError(f"block_lengths: {error}") from None
    longest = {setup.task.name: setup for setup in sorted(setups, key=lambda setup: setup.gen_length)}
    for setup in longest.values():
        for problem in _problems(setup.task, recipe.check):
            length = len(model.encode_prompt(problem.prompt))
            model.check_length(setup.task.name, min(length, recipe.prompt_length or length), setup.gen_length)


def _problems(task: Task, held_out: int) -> Iterator[Problem]:
    """All problems that training may meet, or a sample of them if the task generates them without end."""
    rng = random.Random(0)
    count = task.count("train")
    if count is None:
        yield from (task.draw(rng, "train") for _ in range(_DRAWN))
    else:
        yield from task.problems(count, 0, "train")
    yield from task.problems(held_out, CHECK_SEED, "heldout")
