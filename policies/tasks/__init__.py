"""Problems with checkable answers, to train models on and to judge samplers and policies by."""

from policies.tasks.base import Problem, Split, Task, split_of
from policies.tasks.datasets import GSM8K, MATH
from policies.tasks.prompts import PromptFile
from policies.tasks.registry import FILE_SPECS, UnknownTaskError, embedded_tasks, get_task, list_tasks

__all__ = [
    "FILE_SPECS",
    "GSM8K",
    "MATH",
    "Problem",
    "PromptFile",
    "Split",
    "Task",
    "UnknownTaskError",
    "embedded_tasks",
    "get_task",
    "list_tasks",
    "split_of",
]
