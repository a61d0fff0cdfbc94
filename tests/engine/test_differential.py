"""The engine's packed, cached, batched forwards against a slow loop that is plainly right: the same tokens.

The slow loop runs one generation at a time, every position of every forward, the softmax of every row, on Python lists.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samplers import AttentionPattern, CacheMode, Canvas, Layout, Statistic, Step, get_sampler
from samplers.columns import Columns, LayoutColumns
from samplers.contract import CanvasReader
from samplers.loop.row import Row
from server.backends.contract import ModelInfo
from server.backends.loading import describe as describe_model
from server.backends.torch.backend import TorchBackend
from server.models.network import Network
from tests.engine.arrivals import finish
from tests.tiny import tiny_config, tiny_network
from tests.tiny_dream import tiny_dream, tiny_dream_config

VOCABULARY, MASK, END = 60, 0, 7


def made(seed: int) -> TorchBackend:
    """A random model, sure enough of itself that decisions are not about the last bit."""
    network = tiny_network(tiny_config(VOCABULARY, n_layers=1 + seed % 3), seed)
    network.transformer.ff_out.weight.data.mul_(3.0)
    info = ModelInfo("LLaDAModelLM", 256, VOCABULARY, MASK, frozenset({END}), None, "cpu", "float32", 0)
    return TorchBackend(network, info)


def made_shifted() -> TorchBackend:
    """One whose outputs are about the next position."""
    network = tiny_dream(tiny_dream_config(VOCABULARY, mask_token_id=MASK, eos_token_id=END))
    return TorchBackend(network, describe_model("DreamModel", network))


MODELS = [*(made(seed) for seed in range(3)), made_shifted()]
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"k": 1}, {"k": 3}, {"steps": 20}],
    "random": [{"k": 2}],
    "sequential": [{"k": 2}],
    "threshold": [{"threshold": 0.5}, {"threshold": 0.9, "k": 2}],
    "factor": [{"factor": 1.0}],
    "margin": [{"k": 2}, {"threshold": 0.3}],
    "entropy": [{"k": 2}],
    "entropy_bound": [{"gamma": 0.5}],
    "hierarchy": [{}],
    "dream": [{"alg": "topk_margin", "steps": 20}],
}


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    gen_length: int
    block_length: int
    suffix: list[int]
    sampler: str
    params: dict[str, Any]
    seed: int
    ends: bool
    fill: bool

    def row(self, pattern: AttentionPattern, cache: CacheMode = CacheMode.NONE) -> Row:
        sampler = get_sampler(self.sampler)
        ends = frozenset({END}) if self.ends else frozenset[int]()
        canvas = Canvas.blank(self.prompt, self.gen_length, MASK, self.block_length, self.suffix, pattern)
        params = sampler.Params(**self.params)
        return Row(canvas, sampler, params, seed=self.seed, end_ids=ends, fill_after_end=self.fill, cache=cache)


tokens = st.integers(1, VOCABULARY - 1)
cases = st.sampled_from(sorted(SAMPLERS)).flatmap(
    lambda name: st.builds(
        Case,
        # With nothing but masks all positions are alike, and which is the surest is a matter of rounding.
        prompt=st.lists(tokens, min_size=2, max_size=12, unique=True),
        gen_length=st.integers(1, 20),
        block_length=st.integers(1, 20),
        suffix=st.lists(tokens, max_size=4),
        sampler=st.just(name),
        params=st.sampled_from(SAMPLERS[name]),
        seed=st.integers(0, 2**62),
        ends=st.booleans(),
        fill=st.booleans(),
    )
)


def slow(network: Network, case: Case) -> tuple[list[int], int]:
    """The canvas at the end, and the number of forwards."""
    sampler = get_sampler(case.sampler)
    params = sampler.Params(**case.params)
    length, block_length = case.gen_length, min(case.block_length, case.gen_length)
    first = len(case.prompt)
    canvas = [*case.prompt, *[MASK] * length, *case.suffix]
    open_positions = set(range(length))
    layout = Layout(first, length, block_length, len(case.suffix))
    end: int | None = None
    forwards = block_step = 0
    block = -1
    masks = 0
    while open_positions and not (end is not None and min(open_positions) > end):
        now = min(open_positions) // block_length
        if now != block:
            block, block_step = now, 0
            masks = len([p for p in open_positions if p // block_length == block])
        candidates = [p for p in range(length) if p in open_positions and p // block_length == block]
        logits = network(torch.tensor([canvas]))[0].double()
        said = [describe(logits[max(0, first + p - network.pattern.shifted)]) for p in candidates]
        step = naive_step(candidates, said, layout, params, (case.seed, forwards, block, block_step, masks))
        chosen = sampler.select(step).commit[0].nonzero()[:, 0].tolist()
        if not chosen:
            chosen = [max(candidates, key=lambda p: said[candidates.index(p)]["confidence"])]
        for position in chosen:
            token = int(said[candidates.index(position)]["token"])
            canvas[first + position] = token
            open_positions.discard(position)
            if token == END and case.ends:
                end = position if end is None else min(end, position)
        if end is not None and case.fill:
            for position in [p for p in open_positions if p > end]:
                canvas[first + position] = canvas[first + end]
                open_positions.discard(position)
        forwards += 1
        block_step += 1
    return canvas, forwards


def describe(logits: Tensor) -> dict[str, float]:
    """All statistics of one row, by their definitions."""
    p = logits.softmax(dim=-1)
    allowed = p.clone()
    allowed[MASK] = -1
    token = int(allowed.argmax())
    ranked = p.sort(descending=True).values
    entropy = -float(sum(x * torch.log(x) for x in p if x > 0))
    margin = float(ranked[0] - ranked[1])
    return {
        "token": token,
        "confidence": float(p[token]),
        Statistic.ENTROPY: entropy,
        Statistic.MARGIN: margin,
        Statistic.CHOSEN_CONFIDENCE: float(p[token]),
        Statistic.CHOSEN_ENTROPY: entropy,
        Statistic.CHOSEN_MARGIN: margin,
        Statistic.LIKELIEST: token,
    }


def naive_step(
    candidates: list[int], said: list[dict[str, float]], layout: Layout, params: Any, counters: tuple[int, ...]
) -> Step:
    def grid(name: str, empty: float) -> Tensor:
        out = torch.full((1, layout.gen_length), float(empty))
        out[0, candidates] = torch.tensor([each[name] for each in said], dtype=torch.float32)
        return out

    candidate = torch.zeros(1, layout.gen_length, dtype=torch.bool)
    candidate[0, candidates] = True
    seed, forward, block, block_step, masks = (torch.tensor([[value]]) for value in counters)
    width = layout.gen_length
    return Step(
        candidate=candidate,
        masked=candidate,
        committed=candidate & False,
        position=torch.arange(width)[None],
        columns=Columns.of([params]),
        layout=layout_columns(layout),
        block_start=torch.tensor([[min(candidates)]]),
        slot=torch.tensor([[0]]),
        state={},
        canvas=CanvasReader(torch.zeros(1, layout.length, dtype=torch.int64), torch.tensor([[0]])),
        token=grid("token", -1).long(),
        confidence=grid("confidence", -torch.inf),
        extra={name: grid(name, torch.nan) for name in Statistic},
        params=[params],
        seed=seed,
        forward=forward,
        block=block,
        block_step=block_step,
        block_masks=masks,
    )


def layout_columns(layout: Layout) -> LayoutColumns:
    names = ("length", "prompt_length", "gen_length", "block_length", "blocks", "denoised_length")
    lengths = {name: torch.tensor([[getattr(layout, name)]]) for name in names}
    return LayoutColumns(**lengths, noise=torch.tensor([[0]]), strict=torch.tensor([[layout.pattern.strict]]))


@pytest.mark.parametrize("number", range(len(MODELS)))
@settings(max_examples=25, derandomize=True)  # two near-equal numbers may round either way: the same cases always
@given(batch=st.lists(cases, min_size=1, max_size=5), arrivals=st.lists(st.integers(0, 6), min_size=5, max_size=5))
def test_the_same_tokens_as_the_slow_loop(number: int, batch: list[Case], arrivals: list[int]) -> None:
    """Rows of different samplers, lengths and ages in one forward, some arriving in the middle of others."""
    backend = MODELS[number]
    rows = [case.row(backend.info.pattern) for case in batch]
    finish(rows, arrivals, backend)
    for case, row in zip(batch, rows, strict=True):
        assert (row.canvas.tokens.tolist(), row.forwards) == slow(backend.network, case)
