"""Tasks of a recipe, each with the ways of decoding its answers."""

from dataclasses import dataclass

from policies.block_length import within
from policies.tasks import Task, get_task
from policies.training.recipe import PolicyRecipe
from samplers import Layout


@dataclass(frozen=True)
class DecodingSetup:
    """A task and the decoding of its answers; without `block_length` it is full diffusion."""

    task: Task
    gen_length: int
    block_length: int | None

    @property
    def blocks(self) -> int:
        """Number of blocks of one generation."""
        return Layout(0, self.gen_length, self.block_length or self.gen_length).blocks

    def __str__(self) -> str:
        return self.task.name if self.block_length is None else f"{self.task.name}/{self.block_length}"


def setups_of(recipe: PolicyRecipe) -> list[DecodingSetup]:
    """All different pairs of a recipe's tasks and block lengths; a block as long as the canvas is full diffusion."""
    found: dict[tuple[str, int | None], DecodingSetup] = {}
    for asked in recipe.block_lengths:
        for name in recipe.tasks:
            task = get_task(name)
            length = recipe.gen_length or task.gen_length
            block_length = within(None if asked == "full" else asked, length)
            found.setdefault((name, block_length), DecodingSetup(task, length, block_length))
    return list(found.values())
