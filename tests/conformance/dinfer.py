"""dInfer's loops: threshold, credit and hierarchy decoders, without and with caches."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samplers import CacheMode, Canvas, Layout, Sampler, get_sampler
from samplers.forward.span import ForwardSpan
from samplers.loop.row import Row
from samplers.loop.run import run
from tests.conformance.generation import Check, Family
from tests.conformance.models import check_cache
from tests.conformance.originals import InferCredit, InferThreshold
from tests.conformance.replay import compare_states, distinct
from tests.conformance.report import Difference

CACHES = {None: CacheMode.NONE, "prefix": CacheMode.PREFIX, "dual": CacheMode.DUAL}


@dataclass(eq=False)
class InferRow(Row):
    """A generation that spans what dInfer spans.

    Attributes:
        before, after: positions around the block that are fed with it (`prefix_look`, `after_look`).
        warmup: iterations of the generation, each of one forward, before anything is kept.
    """

    before: int = 0
    after: int = 0
    warmup: int = 0
    fresh: bool = field(default=True, init=False)

    def span(self) -> ForwardSpan:
        length = self.canvas.layout.length
        if self.cache is CacheMode.NONE or self.warmup:
            return ForwardSpan(0, length)
        if self.fresh:
            return ForwardSpan(0, length, self.plan.memory)
        layout = self.canvas.layout
        start = layout.prompt_length + self.block * layout.block_length
        stop = start + layout.block_size(self.block)
        if self.cache is CacheMode.PREFIX:
            return ForwardSpan(start, length, self.plan.memory)
        return ForwardSpan(max(0, start - self.before), min(length, stop + self.after), self.plan.memory)


class InferFamily(Family):
    """The folder: `cases.json`, replayed on llada's checkpoint beside it."""

    def __init__(self, folder: Path, engine: str = "torch") -> None:
        super().__init__(folder, engine)
        self._folder = (folder / self.cases["checkpoint"]).parent.resolve()

    def checks(self) -> Iterator[tuple[str, Check]]:
        for case in self.cases["cases"]:
            yield case["name"], lambda case=case: self._generate(case)  # type: ignore[misc]

    @torch.inference_mode()
    def _generate(self, case: dict[str, Any]) -> None:
        predict = self.backend().predict
        check_cache(self.backend(), CACHES[case["cache"]])
        row = self._row(case)
        steps = run([row], predict, may_wait=True)
        states: list[list[int]] = []
        forwards = 0

        def forward() -> bool:
            """One forward, whether there is anything to decide or not; False once the block is finished."""
            nonlocal forwards
            forwards += 1
            if not row.finished and row.block == block:
                ((_, event),) = next(steps)
                if event.error is not None:
                    raise event.error
            states.append(row.canvas.tokens.tolist())
            return not row.finished and row.block == block

        llm, ends = case["llm"], case.get("eos_id", self.cases["eos_id"])
        while not row.finished:
            block = row.block
            row.fresh = True
            open_block = True
            while open_block:
                masks = len(row.candidates())
                turns = max(min(masks // llm["expected_tpf"], llm["maximum_unroll"]), 1)
                if row.cache is not CacheMode.NONE and row.fresh and not row.warmup:
                    open_block = forward()
                    row.fresh = False
                for _ in range(turns):
                    open_block = forward()
                row.warmup = max(0, row.warmup - 1)
            layout = row.canvas.layout
            done = row.canvas.generated[block * layout.block_length :][: layout.block_length]
            if bool((done == ends).any()):
                if llm["early_stop"]:
                    row.canvas.generated[row.canvas.masked] = ends
                break
        states[-1] = tokens = row.canvas.tokens.tolist()
        record = [state[0] for state in case["trajectory"]]
        compare_states(distinct(states), record, 0)
        if tokens != case["canvas_final"][0]:
            raise Difference(f"the last canvas is {tokens}, not {case['canvas_final'][0]}")
        if [token for token in tokens if token != ends] != case["output"][0]:
            raise Difference("the answer differs")
        if forwards != case["nfe"]:
            raise Difference(f"{forwards} forwards, the original's nfe is {case['nfe']}")

    def _row(self, case: dict[str, Any]) -> InferRow:
        (prompt,) = case["prompt"]
        mask_id, block_length = self.cases["mask_id"], case["block_length"]
        start = len(prompt) // block_length * block_length if case["start_block_align"] else len(prompt)
        length = len(prompt) + case["gen_length"]
        tokens = torch.tensor([*prompt, *[mask_id] * case["gen_length"]])
        canvas = Canvas(Layout(start, length - start, block_length), tokens, torch.arange(start, length) >= len(prompt))
        sampler, params = self._decoder(case["decoder"], mask_id)
        llm = case["llm"]
        return InferRow(
            canvas,
            sampler,
            sampler.Params(**params),
            cache=CACHES[case["cache"]],
            before=llm.get("prefix_look", 0),
            after=llm.get("after_look", 0),
            warmup=llm.get("warmup_steps", 0),
        )

    def _decoder(self, decoder: dict[str, Any], mask_id: int) -> tuple[Sampler, dict[str, Any]]:
        names = {"credit_alpha": "alpha", "boost_gamma": "gamma", "decay_beta": "beta"}
        params = {
            names.get(name, name): value for name, value in decoder.items() if name not in ("class", "temperature")
        }
        match decoder["class"]:
            case "ThresholdParallelDecoder":
                return InferThreshold(mask_id), params
            case "CreditThresholdParallelDecoder":
                return InferCredit(mask_id), params
            case _:
                return get_sampler("hierarchy"), params
