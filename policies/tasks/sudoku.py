"""4x4 Sudoku: several right answers whose cells exclude each other."""

import random
from functools import cache

from policies.tasks.base import Problem, Task


@cache
def all_grids() -> tuple[tuple[int, ...], ...]:
    """The 288 complete 4x4 grids, each as 16 digits row by row."""
    grids: list[tuple[int, ...]] = [()]
    for cell in range(16):
        row, column = divmod(cell, 4)
        grids = [(*grid, digit) for grid in grids for digit in (1, 2, 3, 4) if _fits(grid, row, column, digit)]
    return tuple(grids)


def _fits(grid: tuple[int, ...], row: int, column: int, digit: int) -> bool:
    return not any(
        value == digit and (i // 4 == row or i % 4 == column or (i // 8 == row // 2 and i % 4 // 2 == column // 2))
        for i, value in enumerate(grid)
    )


def draw_rows(cells: list[str]) -> str:
    return "".join("\n " + " ".join(cells[start : start + 4]) for start in range(0, 16, 4))


def read_cells(text: str) -> list[str]:
    return text.partition(":")[2].split()


class Sudoku(Task):
    """Five to eight of sixteen cells are given; any valid completion is right."""

    name = "sudoku"
    description = "4x4 Sudoku with five to eight clues; any valid completion is right"
    gen_length = 24
    clues = (5, 8)

    def sample(self, rng: random.Random) -> Problem:
        grid = [str(digit) for digit in rng.choice(all_grids())]
        shown = set(rng.sample(range(16), rng.randint(*self.clues)))
        clues = [digit if i in shown else "_" for i, digit in enumerate(grid)]
        prompt = f"Solve this Sudoku:{draw_rows(clues)}"
        return Problem(self.name, "".join(clues), prompt, "".join(grid), f"Solution:{draw_rows(grid)}")

    def check(self, problem: Problem, completion: str) -> bool:
        return "".join(read_cells(completion)) in self._completions(problem) and len(read_cells(completion)) == 16

    def solutions(self, problem: Problem) -> list[str]:
        return [f"Solution:{draw_rows(list(grid))}" for grid in self._completions(problem)]

    def _completions(self, problem: Problem) -> list[str]:
        clues = read_cells(problem.prompt)
        grids = ("".join(map(str, grid)) for grid in all_grids())
        return [grid for grid in grids if all(c in ("_", g) for c, g in zip(clues, grid, strict=True))]
