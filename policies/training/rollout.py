"""Unmasking as a Markov decision process: the same loop that serves, recorded.

The frozen model and its tokenizer come as a `ModelUnderTest`; nothing here knows an architecture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from policies.evaluation.oracle import Oracle
from policies.model_under_test import ModelUnderTest
from policies.network.config import PolicyConfig
from policies.network.features import statistics
from policies.network.observation import observe
from policies.tasks import Problem, Task
from policies.training.transitions import Transitions
from samplers import Sampler, SamplerParams, Selection, Statistic, Step
from samplers.loop.row import Row
from samplers.loop.run import run


@dataclass(frozen=True)
class Decision:
    """Decision of an actor in one step.

    Attributes:
        action: bool [rows, width], as drawn.
        commit: bool [rows, width], as committed; the loop adds the surest candidate where a row has none.
        order: int64 [rows, width], for ordered draws (see `dpls_draw`).
    """

    action: Tensor
    commit: Tensor
    order: Tensor | None = None


class Actor(Protocol):
    """Decides what rows commit. `live` in `choose` is int64 [rows], their numbers in the rollout."""

    statistics: frozenset[Statistic]
    top: int
    whole_region: bool

    def choose(self, step: Step, live: Tensor) -> Decision: ...


@dataclass
class Rollout:
    """Finished generations. `correct` is 1 or 0, [n]; `forwards`, `tokens` and `budget` are int64 [n]."""

    problems: list[Problem]
    correct: Tensor
    forwards: Tensor
    tokens: Tensor
    budget: Tensor
    texts: list[str]
    records: Transitions | None = None


@dataclass
class _Recorder(Sampler):
    """An actor as a sampler, with records of every step."""

    actor: Actor
    config: PolicyConfig | None
    waits: bool
    oracles: list[Oracle]
    lines: list[Transitions] = field(default_factory=list)
    name = "recorder"
    sees_region = True

    class Params(SamplerParams):
        number: int = Field(description="place in the rollout")

    def __post_init__(self) -> None:
        self.statistics, self.top, self.whole_region = self.actor.statistics, self.actor.top, self.actor.whole_region
        if self.config is not None:
            self.statistics |= statistics(self.config.features)
            self.top = max(self.top, self.config.largest)
            self.whole_region |= self.config.region

    def select(self, step: Step) -> Selection:
        live = step.param("number")[:, 0]
        decision = self.actor.choose(step, live)
        if self.config is not None:
            self.lines.append(
                Transitions(
                    row=live,
                    seen=observe(step, self.config),
                    candidates=step.candidate,
                    action=decision.action,
                    committed=decision.commit,
                    confidence=step.confidence,
                    order=decision.order,
                    right=self._right(step, live),
                )
            )
        return Selection(decision.commit, waits=self.waits)

    def _right(self, step: Step, live: Tensor) -> Tensor | None:
        """Commits of each row's oracle, bool [rows, width]; None without oracles."""
        if not self.oracles:
            return None
        asked = [self.oracles[i] for i in live.tolist()]
        return torch.stack([each.right(*row) for each, *row in zip(asked, step.token, step.candidate, strict=True)])


def rollout(
    model: ModelUnderTest,
    task: Task,
    problems: Sequence[Problem],
    actor: Actor,
    *,
    gen_length: int,
    block_length: int | None,
    seeds: Sequence[int],
    batch: int = 64,
    prompt_length: int | None = None,
    record: PolicyConfig | None = None,
    allow_empty: bool = False,
    ask_oracle: bool = False,
) -> Rollout:
    """Run one generation for each problem to its end.

    Args:
        actor: decides what to commit.
        seeds: each generation's random stream.
        batch: most rows of one forward. All rows of a rollout go through it together, in this many at a time.
        prompt_length: keep only the last tokens of a longer prompt.
        record: keep what a policy of this configuration sees.
        allow_empty: a step may commit nothing: it costs a forward, and a block that has had as many forwards as
            positions ends the generation, unfinished and wrong (the paper's training environment).
        ask_oracle: keep also what the oracle would have committed.

    Raises ValueError if a prompt is too long for the model, SamplerError if a generation cannot go on.
    """
    recorder = _Recorder(actor, record, waits=allow_empty, oracles=[])
    rows: list[Row] = []
    for problem, seed in zip(problems, seeds, strict=True):
        prompt = model.encode_prompt(problem.prompt)
        prompt = prompt[-(prompt_length or len(prompt)) :]
        model.check_length(task.name, len(prompt), gen_length)
        canvas = model.canvas(prompt, gen_length, block_length)
        params = recorder.Params(number=len(rows))
        rows.append(Row(canvas, recorder, params, seed=seed, end_ids=model.end_ids))
        if ask_oracle:
            recorder.oracles.append(Oracle.for_problem(task, problem, canvas, model.encode, model.end_ids))
    stuck: set[int] = set()

    def parts() -> Iterator[list[Row]]:
        """Rows that are not finished, up to `batch` at a time."""
        while live := [row for i, row in enumerate(rows) if not row.finished and i not in stuck]:
            for start in range(0, len(live), batch):
                yield live[start : start + batch]

    number, taking = {id(row): i for i, row in enumerate(rows)}, parts()
    for turn in run(lambda: next(taking, []), model.predict, may_wait=allow_empty):
        for row, event in turn:
            if event.error is not None:
                raise event.error
            if allow_empty and not row.finished and row.block_step >= row.canvas.layout.block_length:
                stuck.add(number[id(row)])
    texts = [model.decode(row.text_tokens()) for row in rows]
    right = [
        i not in stuck and task.check(problem, text)
        for i, (problem, text) in enumerate(zip(problems, texts, strict=True))
    ]
    return Rollout(
        problems=list(problems),
        correct=torch.tensor(right, dtype=torch.float32),
        forwards=torch.tensor([row.forwards for row in rows]),
        tokens=torch.tensor([row.completion_tokens for row in rows]),
        budget=torch.full((len(rows),), gen_length),
        texts=texts,
        records=None if record is None else Transitions.join(recorder.lines),
    )
