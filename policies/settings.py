"""What a recipe trains on: tasks, each in every way of decoding."""

from dataclasses import dataclass

from policies.recipe import PolicyRecipe
from policies.tasks import Task, get_task


@dataclass(frozen=True)
class Setting:
    """A task, and how its answers are decoded; no `block_length` is full diffusion."""

    task: Task
    gen_length: int
    block_length: int | None

    def __str__(self) -> str:
        return self.task.name if self.block_length is None else f"{self.task.name}/{self.block_length}"


def settings_of(recipe: PolicyRecipe) -> list[Setting]:
    """Every pair of the recipe's tasks and block lengths once; a block as long as the canvas is full diffusion."""
    found: list[Setting] = []
    for asked in recipe.block_lengths:
        for name in recipe.tasks:
            task = get_task(name)
            length = recipe.gen_length or task.gen_length
            block_length = None if asked == "full" or asked >= length else asked
            if not any((known.task.name, known.block_length) == (name, block_length) for known in found):
                found.append(Setting(task, length, block_length))
    return found
