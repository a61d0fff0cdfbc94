"""Fast-dLLM v2's `generate`, for one prompt, and `batch_sample`, in which the rows of a batch wait for each other."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from samplers import CacheMode, Canvas, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.span import ForwardSpan, KVSlot
from samplers.forward.summary import summarise
from samplers.loop.event import StepEvent
from samplers.loop.row import Row
from samplers.loop.run import run as run_loop
from server.backends.torch.backend import TorchBackend
from tests.conformance.blocks import Drawer, block_causal, cached_prefix, parameters, within_range
from tests.conformance.forwards import Tensors, compare, given
from tests.conformance.generation import Family
from tests.conformance.models import fed_logits
from tests.conformance.report import Difference, NotBuilt

DEFAULTS: dict[str, Any] = {
    "mask_id": None,
    "max_new_tokens": None,
    "block_size": 32,
    "small_block_size": 8,
    "stop_token": 151645,
    "use_block_cache": False,
    "top_p": 0.95,
    "temperature": 0.0,
}
GENERATE = DEFAULTS | {"threshold": 1.0, "max_length": None}
BATCH_SAMPLE = DEFAULTS | {"threshold": 0.95, "min_len": None, "pad_token_id": None}

Tokens = list[int]


@dataclass(eq=False)
class SmallBlockRow(Row):
    """A generation that can do what `batch_sample` does to a row of its batch.

    Attributes:
        wide: whether the next forward spans the model's whole block, because another row's does.
        own: place of a block's first position that nobody opens: its own output decides it. -1: there is none.
    """

    wide: bool = field(default=False, kw_only=True)
    own: int = field(default=-1, kw_only=True)

    def span(self) -> ForwardSpan:
        fed = super().span()
        if not self.wide or fed.memory is None or fed.visible is None:
            return fed
        return replace(fed, start=self.plan.final, stop=fed.visible)

    def opens_block(self) -> bool:
        return super().opens_block() and self.place != self.own

    @property
    def place(self) -> int:
        """First position of the active small block, on the canvas."""
        return self.canvas.layout.block_place(self.block)

    def shown(self, stop: int) -> Tokens:
        """The canvas up to there."""
        tokens: Tokens = self.canvas.tokens[:stop].tolist()
        return tokens


@dataclass
class Run:
    """Forwards of our loop, and what the original would have shown its model at each of them.

    Attributes:
        draw: draws tokens; None where the likeliest is taken.
        canvases, stores: each forward's canvases, and whether it stored what a finished block leaves.
    """

    backend: TorchBackend
    draw: Drawer | None
    canvases: list[list[Tokens]] = field(default_factory=list)
    stores: list[bool] = field(default_factory=list)
    _taking: Sequence[SmallBlockRow] = ()

    def __post_init__(self) -> None:
        self._next = self.steps(lambda: self._taking)

    def note(self, canvases: list[Tokens], stores: bool) -> None:
        self.canvases.append(canvases)
        self.stores.append(stores)

    def forward(self, rows: Sequence[SmallBlockRow]) -> list[StepEvent]:
        """One step of these rows: what serves requests does it, unless one of them needs a quirk."""
        if self.draw is None and all(row.place != row.own for row in rows):
            return self._step(rows)
        return [event for row in rows for event in self._step([row])]

    def _step(self, rows: Sequence[SmallBlockRow]) -> list[StepEvent]:
        self._taking = rows
        return next(self._next) if rows else []

    def steps(self, rows: Callable[[], Sequence[SmallBlockRow]]) -> Iterator[list[StepEvent]]:
        """Steps of our loop, each of the rows that are named for it."""

        def taking() -> Sequence[SmallBlockRow]:
            self._taking = rows()
            return self._taking

        for turn in run_loop(taking, self._predict):
            events = [event for _, event in turn]
            for event in events:
                if event.error is not None:
                    raise event.error
            yield events

    def _predict(self, query: Query) -> Prediction:
        return self.backend.predict(query) if self._plain() else self._quirky(query, self._taking[0])

    def _plain(self) -> bool:
        """Whether the likeliest token is what the original takes; it never draws the one that opens a block."""
        return all(row.opens_block() or (self.draw is None and row.place != row.own) for row in self._taking)

    def _quirky(self, query: Query, row: SmallBlockRow) -> Prediction:
        """Tokens drawn for the whole small block, decided or not; what nobody opened is decided by its own output."""
        (fed,) = query.spans
        places = torch.arange(row.place, row.place + row.canvas.layout.block_length)
        before = (places - 1).clamp(min=fed.start)
        before[places == row.own] = row.own
        logits = fed_logits(self.backend, query.canvases, query.spans)[0, before - fed.start]
        at = query.position - row.place
        if self.draw is None:
            return summarise(logits[at], self.backend.info.mask_id)
        token, confidence = self.draw(logits)
        return Prediction(token[at], confidence[at], {})


class FastDLLMFamily(Family):
    """The folder."""

    def _forward(self, name: str, tensors: Tensors) -> None:
        with torch.inference_mode():
            if name == "cached_prefix":
                cached_prefix(self.backend(), tensors, int(tensors["cached_prefix.block_size"]))
            elif name == "block_cache":
                block_cache(self.backend(), tensors)
            elif found := re.match(r"block(\d+)", name):
                ids, logits = tensors[f"{name}.input_ids"], tensors[f"{name}.logits"]
                block_causal(self.backend(), ids, int(found[1]), logits)
            else:
                raise NotBuilt(f"a forward called {name}")

    def _generate(self, case: dict[str, Any]) -> None:
        """Without a cache and with the exact one, or with the one of small blocks, which approximates."""
        function = case["function"].rpartition(".")[2]
        if function not in ("generate", "batch_sample"):
            raise NotBuilt(case["function"])
        params = parameters(case, GENERATE if function == "generate" else BATCH_SAMPLE)
        exact = (CacheMode.NONE, CacheMode.PREFIX)
        for cache in (CacheMode.DUAL,) if params["use_block_cache"] else exact:
            drawn = params["temperature"] > 0
            if drawn and len(case["prompt"]) > 1:
                raise NotBuilt("drawn tokens of several rows, which the original draws for the first only")
            draw = Drawer(case["manual_seed"], params["temperature"], top_p=params["top_p"]) if drawn else None
            run = Run(self.backend(), draw)
            with torch.inference_mode():
                output = (generate if function == "generate" else batch_sample)(run, case, params, cache)
            compare_runs(run, output, case, cache)


def row_of(
    prompt: Tokens, length: int, params: dict[str, Any], cache: CacheMode, run: Run, own: int = -1, **more: Any
) -> SmallBlockRow:
    """A generation up to a canvas of this length; `more` are fields of a row."""
    # Its block can be shorter than the model's own: the original is told so at each call.
    pattern = replace(run.backend.info.pattern, causal_block=params["block_size"])
    canvas = Canvas.blank(prompt, length - len(prompt), params["mask_id"], params["small_block_size"], pattern=pattern)
    sampler = get_sampler("threshold")
    rule = sampler.Params(threshold=within_range(params["threshold"]))
    return SmallBlockRow(canvas, sampler, rule, cache=cache, own=own, **more)


def generate(run: Run, case: dict[str, Any], params: dict[str, Any], cache: CacheMode) -> list[Tokens]:
    """One prompt, up to the stop token; the forward that stores a finished block decides the next one's first token."""
    (prompt,) = case["prompt"]
    size = params["block_size"]
    new = params["max_new_tokens"]
    blocks = (params["max_length"] - len(prompt) if new is None else new) // size
    ends: dict[str, Any] = {"end_ids": frozenset({params["stop_token"]}), "fill_after_end": False}
    row = row_of(prompt, (len(prompt) // size + blocks) * size + 1, params, cache, run, **ends)
    if len(prompt) > size and len(prompt) % size:
        run.note([prompt], True)  # the prompt's whole blocks: with us part of the next forward

    def running() -> list[SmallBlockRow]:
        """The row, until it has finished."""
        if row.finished:
            return []
        opens = row.opens_block()
        run.note([row.shown(row.place if opens else (row.place // size + 1) * size)], opens)
        return [row]

    list(run.steps(running))
    return [row.shown(len(prompt) + row.completion_tokens)]


def batch_sample(run: Run, case: dict[str, Any], params: dict[str, Any], cache: CacheMode) -> list[Tokens]:
    """Rows in step: no small block begins before all rows have finished the last."""
    size, small = params["block_size"], params["small_block_size"]
    lengths: Tokens = case["seq_len"]
    least, most = params["min_len"], max(lengths)
    blocks = params["max_new_tokens"] // size + most // size
    rows = []
    for prompt, length in zip(case["prompt"], lengths, strict=True):
        # The longest prompt's last token is overwritten by what opens its block, where it stands first in that block
        # and shorter prompts are in an earlier one.
        lost = length == most and length % size == 1 and least // size < length // size
        own = length if length % size == 0 and length > least and most - length > 1 else -1
        rows.append(row_of(prompt[: length - lost], blocks * size + 1, params, cache, run, own))
    if least > size:
        run.note(case["prompt"], True)
        run.forward([row for row in rows if row.opens_block() and row.place == least])
    done: dict[int, Tokens] = {}
    ended: set[int] = set()
    active = list(range(len(rows)))

    def shown(i: int, stop: int) -> Tokens:
        """The canvas, padded after the stop token if the row has come upon one."""
        tokens = rows[i].shown(stop)
        if i in ended:
            first = tokens.index(params["stop_token"], lengths[i]) + 1
            tokens[first:] = [params["pad_token_id"]] * (stop - first)
        return tokens

    for block in range(least // size, blocks):
        stop = (block + 1) * size
        for place in range(block * size, stop, small):
            while running := [i for i in active if not rows[i].finished and rows[i].place == place]:
                wide = any(int(rows[i].canvas.tokens[place]) == params["mask_id"] for i in running)
                for i in running:
                    rows[i].wide = wide
                run.note([rows[i].shown(stop) for i in active], False)
                events = run.forward([rows[i] for i in running])
                ended |= {i for i, e in zip(running, events, strict=True) if params["stop_token"] in e.tokens}
                for i in running:
                    rows[i].wide = False
        left = [i for i in active if i not in ended]
        if left:
            run.note([shown(i, stop) for i in active], True)
            run.forward([rows[i] for i in left if rows[i].opens_block() and rows[i].place == stop])
        for i in ended.intersection(active):
            done[i] = shown(i, stop) + [params["pad_token_id"]] * bool(left)
        active = left
        if not active:
            break
    return [done[i] if i in done else rows[i].shown(stop + 1) for i in range(len(rows))]


def compare_runs(run: Run, output: list[Tokens], case: dict[str, Any], cache: CacheMode) -> None:
    """Everything that was recorded."""
    pairs = zip(run.canvases, case["canvas_before_each_forward"], strict=False)
    for number, (ours, originals) in enumerate(pairs, start=1):
        if ours != originals:
            raise Difference(f"cache {cache}, forward {number}: {ours}, the original has {originals}")
    counted = {
        "nfe": len(run.stores),
        "nfe_denoise": run.stores.count(False),
        "forward_updates_cache": run.stores,
        "output": output,
    }
    for key, value in counted.items():
        if value != case[key]:
            raise Difference(f"cache {cache}: {key} is {value}, the original's {case[key]}")


def block_cache(backend: TorchBackend, tensors: Tensors) -> None:
    """A forward over a block after its prefix, and one over a part of it, the rest known from the first."""
    (ids,) = tensors["cached_prefix.input_ids"]
    start, size = int(tensors["cached_prefix.prefix_len"]), int(tensors["cached_prefix.block_size"])
    memory = KVSlot()
    fed_logits(backend, [given(ids)], [ForwardSpan(0, start, memory, start, size)])
    stop = start + tensors["block_cache.first_full_block_logits"].shape[1]
    found = fed_logits(backend, [given(ids)], [ForwardSpan(start, stop, memory, stop, size)])
    compare("logits of the block", found, tensors["block_cache.first_full_block_logits"])
    first = start + int(tensors["block_cache.replace_position"])
    (part,) = tensors["block_cache.sub_block_input_ids"]
    changed = ids.clone()
    changed[first : first + len(part)] = part
    found = fed_logits(backend, [given(changed)], [ForwardSpan(first, first + len(part), memory, stop, size)])
    compare("logits of a part", found, tensors["block_cache.sub_block_logits"])
