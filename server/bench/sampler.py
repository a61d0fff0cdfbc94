"""Milliseconds per denoising step without the model: query, selection, commit and events."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from samplers import Canvas, Sampler, SamplerParams, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import run
from server.bench.results import Figure
from server.runtime.threads import run_in_own_thread

MASK, VOCABULARY, PROMPT = 0, 32_000, 64
RuleAndParams = tuple[Sampler[Any], SamplerParams]
MIX = ("topk", "threshold", "entropy_bound", "margin", "entropy", "dream", "hierarchy", "random")
"""Rules of the "mix", assigned to the rows in turn."""
SAMPLERS = ("threshold", "topk", "entropy_bound", "mix", "policy:chain")
WARM_UP = 8
"""Number of initial steps that do not count."""


def measure_sampler(
    samplers: Sequence[str] = SAMPLERS,
    rows: Sequence[int] = (1, 16, 64),
    block_lengths: Sequence[int] = (32, 256),
    gen_length: int = 256,
    steps: int = 60,
) -> Iterator[Figure]:
    """Median times of steps on one thread. A new row replaces each one that ends, so that all stages occur."""
    for name in samplers:
        rules = _rules(name)
        for block_length in block_lengths:
            for count in rows:
                took = run_in_own_thread(lambda: _median(rules, count, gen_length, block_length, steps))  # noqa: B023
                detail = {"sampler": name, "rows": count, "gen_length": gen_length, "block_length": block_length}
                yield Figure("sampler_step_ms", round(took * 1e3, 4), "milliseconds a step", detail)


def _rules(name: str) -> list[RuleAndParams]:
    """Rules assigned to rows in turn, from the name of a sampler, "mix", or "policy:NAME" for a bundled policy."""
    if name.startswith("policy:"):
        from policies.serving.store import ZOO, PolicyStore, ServedModel

        policy = name.removeprefix("policy:")
        found = PolicyStore(ServedModel("", VOCABULARY)).load(policy, ZOO / policy).sampler
        return [(found, found.Params())]
    rules = [get_sampler(each) for each in (MIX if name == "mix" else (name,))]
    return [(rule, rule.Params()) for rule in rules]


class _Rows:
    """Rows of the next step, with finished ones replaced. Measures the time in between."""

    def __init__(
        self, rules: Sequence[RuleAndParams], count: int, gen_length: int, block_length: int, steps: int
    ) -> None:
        self._rules, self._gen_length, self._block_length, self._steps = rules, gen_length, block_length, steps
        self._made = 0
        self._rows = [self._row(i) for i in range(count)]
        self._began: float | None = None
        self.excluded = 0.0
        self.took: list[float] = []

    def _row(self, place: int) -> Row:
        rule, params = self._rules[place % len(self._rules)]
        canvas = Canvas.blank([5] * PROMPT, self._gen_length, MASK, self._block_length)
        self._made += 1
        # An end-of-text token that the model never produces, so that the search for it is measured too.
        return Row(canvas, rule, params, seed=self._made, end_ids=frozenset({VOCABULARY}))

    def __call__(self) -> list[Row]:
        now = time.thread_time()
        if self._began is not None:
            self.took.append(now - self._began - self.excluded)
        if len(self.took) == self._steps + WARM_UP:
            return []
        for i, row in enumerate(self._rows):
            if row.finished:
                row.release()
                self._rows[i] = self._row(i)
        self.excluded = 0.0
        self._began = time.thread_time()
        return self._rows


def _median(rules: Sequence[RuleAndParams], count: int, gen_length: int, block_length: int, steps: int) -> float:
    """Median seconds per step, without the time of the random predictions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = _Rows(rules, count, gen_length, block_length, steps)

    def predict(query: Query) -> Prediction:
        began = time.thread_time()
        found = _anything(query, generator)
        rows.excluded += time.thread_time() - began
        return found

    try:
        for turn in run(rows, predict):
            for _, event in turn:
                if event.error is not None:
                    raise event.error
    finally:
        torch.set_num_threads(threads)
    return statistics.median(rows.took[WARM_UP:])


def _anything(query: Query, generator: torch.Generator) -> Prediction:
    """Random predictions in place of a model: confidences are uniform over 0.3 to 1."""
    count, wanted = len(query.row), query.wanted
    token = torch.randint(1, VOCABULARY, (count,), generator=generator)
    confidence = 0.3 + 0.7 * torch.rand(count, generator=generator)
    extra = {statistic: torch.rand(count, generator=generator) for statistic in sorted(wanted.statistics)}
    top = torch.rand(count, wanted.top, generator=generator).sort(dim=1, descending=True).values
    named = None if wanted.named is None else torch.rand(wanted.named.shape, generator=generator) * 0.1
    return Prediction(token, confidence, extra, top if wanted.top else None, named)
