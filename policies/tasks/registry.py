"""Tasks by name: the embedded ones, those of the entry point group `unmask.tasks`, and files by a spec."""

import re
from functools import cache, lru_cache
from importlib.metadata import entry_points

from policies.tasks.base import Task
from policies.tasks.chain import Chain
from policies.tasks.datasets import GSM8K, MATH
from policies.tasks.files import FileTask
from policies.tasks.lists import Reverse, Sort, Totals
from policies.tasks.prompts import PromptFile
from policies.tasks.sudoku import Sudoku

_EMBEDDED: tuple[type[Task], ...] = (Chain, Totals, Sort, Reverse, Sudoku)
_FROM_FILES: dict[str, type[FileTask]] = {kind.name: kind for kind in (GSM8K, MATH, PromptFile)}

_GROUP = "unmask.tasks"

FILE_SPECS = "gsm8k:path=FILE, math:path=FILE_OR_FOLDER, file:path=FILE,checker=NAME"
"""Specs of tasks from files, for messages and help; `train=` and `heldout=` may replace `path=`."""


class UnknownTaskError(KeyError):
    """No task of that name; the message lists the known ones."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def embedded_tasks() -> tuple[Task, ...]:
    """Tasks that the embedded model is trained on, whatever other distributions are installed."""
    return tuple(task() for task in _EMBEDDED)


@cache
def _registry() -> dict[str, Task]:
    return {task.name: task for task in embedded_tasks()} | _third_parties()[0]


@cache
def _third_parties() -> tuple[dict[str, Task], dict[str, str]]:
    """Tasks of other distributions by name, and for those that could not be loaded the reason."""
    if not _any_entry_points():
        return {}, {}
    from samplers.plugins import load_plugins  # brings torch, which lists and help do without otherwise

    taken = {*(task.name for task in embedded_tasks()), *_FROM_FILES}
    plugins = load_plugins(_GROUP, Task, taken, _check)  # type: ignore[type-abstract]
    return plugins.found, {
        name: f"task {name!r} of {why.distribution} could not be loaded: {why.reason}"
        for name, why in plugins.broken.items()
    }


def _any_entry_points() -> bool:
    try:
        return bool(entry_points(group=_GROUP))
    except Exception:  # loading them says why they cannot be read
        return True


def _check(task: Task) -> None:
    if not isinstance(task.description, str):
        raise TypeError("description is not text")
    if not (isinstance(task.gen_length, int) and task.gen_length > 0):
        raise TypeError("gen_length is not a number of tokens")


def list_tasks() -> list[Task]:
    """Tasks that need no files, in the order of tables."""
    return list(_registry().values())


def get_task(text: str) -> Task:
    """The task of that name, or from files: `gsm8k:train=A.jsonl,heldout=B.jsonl`, see `FILE_SPECS`.

    Files are read once: the same text gives the same task again. Raises UnknownTaskError, or ValueError with one line
    that names what is wrong in the text or in which line of which file.
    """
    name, colon, rest = text.partition(":")
    if name in _FROM_FILES:
        return _from_files(name, rest)
    found = _registry().get(name)
    if found is None:
        said = _third_parties()[1].get(name, f"unknown task {name!r}")
        raise UnknownTaskError(f"{said}; choose from {', '.join(_registry())}; or {FILE_SPECS}")
    if colon:
        raise ValueError(f"task {name} takes no options, so not {rest!r}")
    return found


@lru_cache(maxsize=16)
def _from_files(name: str, rest: str) -> Task:
    kind, values = _FROM_FILES[name], {}
    # A comma separates options only if an option's name follows; otherwise it belongs to a path.
    for part in re.split(rf",(?=(?:{'|'.join(kind.options)})=)", rest) if rest else ():
        option, equals, value = part.partition("=")
        if option not in kind.options or not (equals and value):
            raise ValueError(f"{name}: {part!r} is not option=value with an option of {', '.join(kind.options)}")
        if option in values:
            raise ValueError(f"{name}: {option} is given twice")
        values[option] = value
    return kind(**values)
