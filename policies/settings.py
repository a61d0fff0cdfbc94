"""What a recipe trains on: tasks, each in every way of decoding."""

from dataclasses import dataclass

from policies.recipe import PolicyRecipe
from policies.tasks import Task, get_task
from samplers import Layout


@dataclass(frozen=True)
class Setting:
    """A task, and how its answers are decoded; no `block_length` is full diffusion."""

    task: Task
    gen_length: int
    block_length: int | None

    @property
    def blocks(self) -> int:
        """Blocks of one generation."""
        return Layout(0, self.gen_length, self.block_length or self.gen_length).blocks

    def __str__(self) -> str:
        return self.task.name if self.block_length is None else f"{self.task.name}/{self.block_length}"


def within(block_length: int | None, gen_length: int) -> int | None:
    """Blocks as long as the generation are full diffusion, None."""
    return None if block_length is None or block_length >= gen_length else block_length


def settings_of(recipe: PolicyRecipe) -> list[Setting]:
    """Every pair of the recipe's tasks and block lengths once; a block as long as the canvas is full diffusion."""
    found: dict[tuple[str, int | None], Setting] = {}
    for asked in recipe.block_lengths:
        for name in recipe.tasks:
            task = get_task(name)
            length = recipe.gen_length or task.gen_length
            block_length = within(None if asked == "full" else asked, length)
            found.setdefault((name, block_length), Setting(task, length, block_length))
    return list(found.values())
