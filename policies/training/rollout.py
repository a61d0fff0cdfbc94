"""Unmasking as a Markov decision process: the same loop that serves, recorded.

The frozen model and its tokenizer come as a `ModelUnderTest`; nothing here knows an architecture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from policies.evaluation.oracle import Oracle
from policies.model_under_test import ModelUnderTest
from policies.network.config import PolicyConfig
from policies.network.features import statistics
from policies.network.observation import observe
from policies.tasks import Problem, Task
from policies.training.transitions import Transitions
from samplers import Sampler, Selection, Statistic, Step
from samplers.loop.denoising import advance, ask
from samplers.loop.row import Row


@dataclass(frozen=True)
class Decision:
    """What a chooser did in one step.

    Attributes:
        action: bool [rows, width], as drawn.
        commit: bool [rows, width], what becomes of it; the loop adds the surest candidate where a row has none.
        order: int64 [rows, width], for ordered draws (see `dpls_draw`).
    """

    action: Tensor
    commit: Tensor
    order: Tensor | None = None


class Actor(Protocol):
    """Decides on the rows of a step; `live` are their numbers in the rollout."""

    statistics: frozenset[Statistic]
    top: int
    region: bool

    def choose(self, step: Step, live: Tensor) -> Decision: ...


@dataclass
class Rollout:
    """Finished generations. `correct` is 1 or 0 [n]; `forwards`, `tokens` int64 [n]; `steps` were recorded if asked."""

    problems: list[Problem]
    correct: Tensor
    forwards: Tensor
    tokens: Tensor
    budget: Tensor
    texts: list[str]
    records: Transitions | None = None


@dataclass
class _Recorder(Sampler):
    """Runs a chooser as a sampler and keeps what it saw."""

    chooser: Actor
    config: PolicyConfig | None
    waits: bool
    oracles: list[Oracle]
    live: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    lines: list[Transitions] = field(default_factory=list)
    name = "recorder"

    def __post_init__(self) -> None:
        self.statistics, self.top, self.region = self.chooser.statistics, self.chooser.top, self.chooser.region
        if self.config is not None:
            self.statistics |= statistics(self.config.features)
            self.top = max(self.top, self.config.largest)
            self.region |= self.config.region

    def select(self, step: Step) -> Selection:
        decision = self.chooser.choose(step, self.live)
        if self.config is not None:
            self.lines.append(
                Transitions(
                    row=self.live,
                    seen=observe(step, self.config),
                    candidates=step.candidate,
                    action=decision.action,
                    committed=decision.commit,
                    confidence=step.confidence,
                    order=decision.order,
                    right=self._right(step),
                )
            )
        return Selection(decision.commit, waits=self.waits)

    def _right(self, step: Step) -> Tensor | None:
        """Commits of each row's oracle, bool [rows, width]; None without oracles."""
        if not self.oracles:
            return None
        asked = [self.oracles[i] for i in self.live.tolist()]
        return torch.stack([each.right(*row) for each, *row in zip(asked, step.token, step.candidate, strict=True)])


def rollout(
    model: ModelUnderTest,
    task: Task,
    problems: Sequence[Problem],
    chooser: Actor,
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
        chooser: decides what to commit.
        seeds: each generation's random stream.
        batch: most rows of one forward. All rows of a rollout go through it together, in this many at a time.
        prompt_length: keep only the last tokens of a longer prompt.
        record: keep what a policy of this configuration sees.
        allow_empty: a step may commit nothing: it costs a forward, and a block that has had as many forwards as
            positions ends the generation, unfinished and wrong (the paper's training environment).
        ask_oracle: keep also what the oracle would have committed.

    Raises ValueError if a prompt is too long for the model, SamplerError if a generation cannot go on.
    """
    recorder = _Recorder(chooser, record, waits=allow_empty, oracles=[])
    rows = []
    for problem, seed in zip(problems, seeds, strict=True):
        prompt = model.encode_prompt(problem.prompt)
        prompt = prompt[-(prompt_length or len(prompt)) :]
        model.check_length(task.name, len(prompt), gen_length)
        canvas = model.canvas(prompt, gen_length, block_length)
        rows.append(Row(canvas, recorder, recorder.Params(), seed=seed, end_ids=model.end_ids))
        if ask_oracle:
            recorder.oracles.append(Oracle.for_problem(task, problem, canvas, model.encode, model.end_ids))
    stuck: set[int] = set()
    with torch.inference_mode():
        while live := [i for i, row in enumerate(rows) if not row.finished and i not in stuck]:
            for start in range(0, len(live), batch):
                part = live[start : start + batch]
                recorder.live = torch.tensor(part)
                running = [rows[i] for i in part]
                query = ask(running)
                outcomes = advance(running, query, model.predict(query), may_wait=allow_empty)
                for i, outcome in zip(part, outcomes, strict=True):
                    if outcome.error is not None:
                        raise outcome.error
                    row = rows[i]
                    if allow_empty and not row.finished and row.block_step >= row.canvas.layout.block_length:
                        stuck.add(i)
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
