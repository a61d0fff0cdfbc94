"""Accuracy and tokens per forward of a sampler on held-out problems, for a model given as callables."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from policies.evaluation.oracle import Oracle
from policies.evaluation.sampler_spec import SamplerSpec
from policies.evaluation.wilson import wilson
from policies.model_under_test import ModelUnderTest
from policies.tasks import Problem, Task
from samplers import CacheMode, Layout, Sampler, get_sampler
from samplers.forward.query import Predict
from samplers.loop.row import Row
from samplers.loop.run import run
from samplers.resources import DEFAULT, ResourceTable, bound

FRONTIER = (
    "random",
    *(f"topk:k={k}" for k in (1, 2, 4, 8)),
    *(f"threshold:threshold={t}" for t in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
    "topk:k=1000",
    "oracle",
)
"""The samplers of the published table; a `k` of at least the generation's length commits everything at once."""


class TrialError(ValueError):
    """A trial that cannot run: too few problems, or a problem that does not fit the model."""


@dataclass(frozen=True)
class Trial:
    """One measurement: `count` held-out problems of a task under a sampler. `block_length` None is full diffusion.

    `chat` records that the model encodes prompts as chat messages.

    Raises ParameterError if the sampler's parameters do not fit the generation.
    """

    task: Task
    sampler: SamplerSpec
    block_length: int | None
    gen_length: int
    count: int
    seed: int = 0
    fill_after_end: bool = True
    chat: bool = False
    cache: CacheMode = CacheMode.NONE

    def __post_init__(self) -> None:
        if self.sampler.name == Oracle.name:
            return
        sampler = get_sampler(self.sampler.name)
        if not DEFAULT.why_missing(sampler):  # otherwise checked with its auxiliaries, before the first forward
            layout = Layout(0, self.gen_length, min(self.block_length or self.gen_length, self.gen_length))
            bound(sampler, self.sampler.params).check(self.sampler.params, layout)

    def settings(self) -> dict[str, Any]:
        """Settings that distinguish measurements of a model from each other, as written to result rows."""
        return {
            "task": self.task.name,
            "sampler": self.sampler.name,
            "params": self.sampler.stated(),
            "block_length": self.block_length,
            "gen_length": self.gen_length,
            "count": self.count,
            "seed": self.seed,
            "fill_after_end": self.fill_after_end,
            "chat": self.chat,
            "cache": self.cache,
            **({"modifiers": modifiers} if (modifiers := self.sampler.stated_modifiers()) else {}),
        }


Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""Integer with a bound: rows are also read from files, where a number of thousands of digits is not a valid count."""


class Measurement(BaseModel):
    """Result of a trial. Accuracy in 0..1 with Wilson 95 % bounds; `tpf` is sum of tokens / sum of forwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    task: str = Field(max_length=1024)
    sampler: str = Field(max_length=1024)
    params: dict[str, Any]
    block_length: Whole | None
    gen_length: Whole
    count: Whole
    seed: Whole
    fill_after_end: bool
    correct: Whole
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    tokens: Whole
    forwards: Whole
    tpf: float
    seconds: float
    chat: bool = False
    cache: CacheMode = CacheMode.NONE
    modifiers: list[dict[str, Any]] = Field([], exclude_if=lambda value: value == [])

    def settings(self) -> dict[str, Any]:
        """See `Trial.settings`."""
        return self.model_dump(include=set(_SETTINGS))


_SETTINGS = (
    *("task", "sampler", "params", "block_length", "gen_length", "count", "seed"),
    *("fill_after_end", "chat", "cache", "modifiers"),
)


def evaluate(
    model: ModelUnderTest,
    trial: Trial,
    batch: int,
    solved: Callable[[], None] = lambda: None,
    resources: ResourceTable = DEFAULT,
) -> Measurement:
    """Run a trial with at most `batch` canvases per forward.

    Args:
        solved: called after each problem, whether the answer is right or wrong.
        resources: auxiliaries of samplers, such as policies.

    Raises TrialError, SamplerError if a generation cannot go on, ParameterError if a resource is missing.
    """
    began = time.monotonic()
    correct = tokens = forwards = 0
    for problem, row in _finish(_start(model, trial, resources), model.predict, batch):
        correct += trial.task.check(problem, model.decode(row.text_tokens()))
        tokens += row.completion_tokens
        forwards += row.forwards
        solved()
    low, high = wilson(correct, trial.count)
    return Measurement(
        **trial.settings(),
        correct=correct,
        accuracy=correct / trial.count,
        accuracy_low=low,
        accuracy_high=high,
        tokens=tokens,
        forwards=forwards,
        tpf=tokens / forwards,
        seconds=round(time.monotonic() - began, 3),
    )


def check_trial(model: ModelUnderTest, trial: Trial, resources: ResourceTable = DEFAULT) -> None:
    """Raise what `evaluate` would raise before the trial's first forward."""
    next(_start(model, trial, resources))


def _start(model: ModelUnderTest, trial: Trial, resources: ResourceTable) -> Iterator[tuple[Problem, Row]]:
    """Rows of the trial, the shortest prompt first: canvases of equal length share a forward without padding."""
    try:
        problems = trial.task.problems(trial.count, trial.seed, "heldout")
    except ValueError as error:
        raise TrialError(str(error)) from None
    prompts = [model.encode_prompt(problem.prompt) for problem in problems]
    try:
        model.check_length(trial.task.name, max(map(len, prompts)), trial.gen_length)
    except ValueError as error:
        raise TrialError(str(error)) from None
    modifiers = [each.bound(model.encode_prompt) for each in trial.sampler.modifiers]
    for i in sorted(range(trial.count), key=lambda i: len(prompts[i])):
        canvas = model.canvas(prompts[i], trial.gen_length, trial.block_length)
        spec, problem = trial.sampler, problems[i]
        if spec.name == Oracle.name:
            sampler: Sampler = Oracle.for_problem(trial.task, problem, canvas, model.encode, model.end_ids)
        else:
            sampler = bound(get_sampler(spec.name), spec.params, resources)
        yield (
            problem,
            Row(
                canvas,
                sampler,
                spec.params,
                seed=trial.seed + i,
                end_ids=model.end_ids,
                fill_after_end=trial.fill_after_end,
                cache=trial.cache,
                modifiers=modifiers,
            ),
        )


def _finish(rows: Iterator[tuple[Problem, Row]], predict: Predict, batch: int) -> Iterator[tuple[Problem, Row]]:
    """Run generations to their end, at most `batch` per forward, and yield each when it is finished."""
    running: list[tuple[Problem, Row]] = []

    def taking() -> list[Row]:
        running.extend(islice(rows, batch - len(running)))
        return [row for _, row in running]

    for turn in run(taking, predict):
        for _, event in turn:
            if event.error is not None:
                raise event.error
        for pair in [pair for pair in running if pair[1].finished]:
            running.remove(pair)
            pair[1].release()
            yield pair
