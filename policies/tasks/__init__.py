"""Problems with checkable answers: what models are trained on and samplers and policies are judged by."""

from policies.tasks.base import Problem, Split, Task, split_of
from policies.tasks.chain import Chain
from policies.tasks.lists import Reverse, Sort, Totals
from policies.tasks.sudoku import Sudoku

_TASKS: dict[str, Task] = {task.name: task for task in (Chain(), Totals(), Sort(), Reverse(), Sudoku())}


def list_tasks() -> list[Task]:
    """All tasks, in the order tables show them."""
    return list(_TASKS.values())


def get_task(name: str) -> Task:
    """The task of that name. Raises KeyError with the names there are."""
    if name not in _TASKS:
        raise KeyError(f"unknown task {name!r}; choose from {', '.join(_TASKS)}")
    return _TASKS[name]


__all__ = ["Problem", "Split", "Task", "get_task", "list_tasks", "split_of"]
