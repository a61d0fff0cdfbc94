"""Block-causal models in the one loop: exact caches, blocks counted from the canvas's start, outputs about the next.

The second opinion is transformers' own network under an explicit mask over the whole canvas, one generation at a time,
every position of every forward, on Python lists.
"""

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samplers import CacheMode, Canvas, Sampler, TokenChoice, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop import run as loop
from samplers.loop.row import Row
from server.backends.loading import describe
from server.backends.torch.backend import TorchBackend
from server.engine import Engine, Event, FinishReason, GenerationRequest
from server.runtime.metrics import Metrics
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, block_mask, decoder_config, decoder_network, in_transformers
from tests.engine.arrivals import finish
from tests.engine.backends import Listener
from tests.engine.test_differential import describe as statistics_of
from tests.engine.test_differential import naive_step
from tests.policies import tiny

VOCABULARY, MASK, END = 60, 0, 7


def made(architecture: str, seed: int, batch_invariant: bool = False, **changes: Any) -> TorchBackend:
    network = decoder_network(decoder_config(architecture, VOCABULARY, **changes), seed)
    return TorchBackend(network, describe(architecture, network), batch_invariant)


MODELS = {
    "sdar": made(SDAR, 1),
    "sdar_moe": made(SDAR_MOE, 2),
    "fast_dllm_v2": made(FAST_DLLM, 3, bd_size=8),
}
TWINS: dict[str, nn.Module] = {name: in_transformers(backend.network) for name, backend in MODELS.items()}
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "topk": [{"k": 1}, {"k": 3}, {"steps": 20}],
    "random": [{"k": 2}],
    "sequential": [{"k": 1}, {"k": 2}],
    "threshold": [{"threshold": 0.5}, {"threshold": 0.9, "k": 2}],
    "margin": [{"k": 2}],
    "entropy_bound": [{"gamma": 0.5}],
}
REVISING: dict[str, list[dict[str, Any]]] = {
    "edit": [{"threshold": 0.4, "edit_threshold": 0.3}],
    "hierarchy_remask": [{"threshold": 0.6, "remask_below": 0.5}],
    "credit": [{}],
    "policy": [{}],
}
POLICY = tiny.sampler(region=True)


def rule(name: str) -> Sampler:
    return POLICY if name == "policy" else get_sampler(name)


@dataclass(frozen=True)
class Case:
    model: str
    prompt: list[int]
    gen_length: int
    block_length: int | None
    sampler: str
    params: dict[str, Any]
    temperature: float
    seed: int
    ends: bool
    fill: bool

    def canvas(self) -> Canvas:
        pattern = MODELS[self.model].info.pattern
        return Canvas.blank(self.prompt, self.gen_length, MASK, self.block_length, pattern=pattern)

    def row(self, cache: CacheMode) -> Row:
        sampler = rule(self.sampler)
        params = {"policy": "p"} | self.params if self.sampler == "policy" else self.params
        return Row(
            self.canvas(),
            sampler,
            sampler.Params(**params),
            TokenChoice(self.temperature),
            self.seed,
            frozenset({END}) if self.ends else frozenset(),
            self.fill,
            cache,
        )


tokens = st.integers(1, VOCABULARY - 1)


def cases(model: str, samplers: dict[str, list[dict[str, Any]]], warm: bool = False) -> st.SearchStrategy[Case]:
    """Prompts that end within a block, at its end, or not at all; canvases that end within a block or at its end."""
    lengths = [None, 1, 2, 4, 8] if MODELS[model].info.pattern.fixed else [None, 1, 3, 4, 5]
    return st.sampled_from(sorted(samplers)).flatmap(
        lambda name: st.builds(
            Case,
            model=st.just(model),
            # With nothing but masks all positions are alike, and which is the surest is a matter of rounding.
            prompt=st.lists(tokens, min_size=0 if name == "sequential" else 1, max_size=20, unique=True),
            gen_length=st.integers(1, 18),
            block_length=st.sampled_from(lengths),
            sampler=st.just(name),
            params=st.sampled_from(samplers[name]),
            temperature=st.sampled_from([0.0, 0.7] if warm and name not in ("credit", "edit") else [0.0]),
            seed=st.integers(0, 2**62),
            ends=st.booleans(),
            fill=st.booleans(),
        )
    )


def slow(case: Case) -> tuple[list[int], int]:
    """The canvas at the end, and the number of forwards."""
    pattern, layout = MODELS[case.model].info.pattern, case.canvas().layout
    size = pattern.causal_block if pattern.fixed else layout.block_length
    assert size is not None
    sampler = get_sampler(case.sampler)
    params = sampler.Params(**case.params)
    first, text_end = len(case.prompt), len(case.prompt) + case.gen_length
    canvas = [*case.prompt, *[MASK] * (-(-text_end // size) * size - first)]
    open_places = set(range(first, len(canvas)))
    end: int | None = None
    forwards = block_step = masks = 0
    block = -1
    while open_places and min(open_places) < text_end and not (end is not None and min(open_places) > end):
        now = min(open_places) // layout.block_length
        places = sorted(p for p in open_places if p // layout.block_length == now)
        if now != block:
            block, block_step, masks = now, 0, layout.block_length
        if pattern.shifted and block_step == 0 and places[0] > 0 and places[0] % size == 0:
            places = places[:1]  # what stands before a block of the model decides its first position, and nothing else
        logits = TWINS[case.model](torch.tensor([canvas]), attention_mask=block_mask(len(canvas), size)).logits[0]
        said = [statistics_of(logits[max(0, p - pattern.shifted)].double()) for p in places]
        here = [p - first for p in places]
        counters = (case.seed, forwards, block - first // layout.block_length, block_step, masks)
        chosen = sampler.select(naive_step(here, said, layout, params, counters)).commit[0].nonzero()[:, 0].tolist()
        if not chosen:
            chosen = [max(here, key=lambda p: said[here.index(p)]["confidence"])]
        for position in chosen:
            token = int(said[here.index(position)]["token"])
            canvas[first + position] = token
            open_places.discard(first + position)
            if token == END and case.ends:
                end = first + position if end is None else min(end, first + position)
        if end is not None and case.fill:
            for place in [p for p in open_places if p > end]:
                canvas[place] = canvas[end]
                open_places.discard(place)
        forwards += 1
        block_step += 1
    return canvas, forwards


def told(row: Row) -> tuple[list[int], int]:
    return row.canvas.tokens.tolist(), row.forwards


arrivals = st.lists(st.integers(0, 6), min_size=4, max_size=4)
caches = st.lists(st.sampled_from([CacheMode.NONE, CacheMode.PREFIX]), min_size=4, max_size=4)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=10)
@given(data=st.data(), arrivals=arrivals, caches=caches)
def test_the_same_tokens_as_the_slow_loop(
    model: str, data: st.DataObject, arrivals: list[int], caches: list[CacheMode]
) -> None:
    """Rows of different samplers, lengths, ages and caches in one forward, some arriving in the midst of others."""
    batch = data.draw(st.lists(cases(model, SAMPLERS), min_size=2, max_size=4))
    rows = [case.row(cache) for case, cache in zip(batch, caches, strict=False)]
    finish(rows, arrivals, MODELS[model])
    for case, row in zip(batch, rows, strict=True):
        assert told(row) == slow(case)


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=12)
@given(data=st.data(), arrivals=arrivals)
def test_a_cache_of_what_is_before_changes_nothing(model: str, data: st.DataObject, arrivals: list[int]) -> None:
    """Samplers that revise, that keep something, that look at the whole region, and tokens that are drawn."""
    batch = data.draw(st.lists(cases(model, SAMPLERS | REVISING, warm=True), min_size=1, max_size=4))
    together = [case.row(CacheMode.PREFIX) for case in batch]
    finish(together, arrivals, MODELS[model])
    for case, row in zip(batch, together, strict=True):
        for cache in (CacheMode.NONE, CacheMode.PREFIX):
            alone = case.row(cache)
            loop.finish([alone], MODELS[model].predict)
            assert told(alone) == told(row)


@settings(max_examples=8)
@given(data=st.data())
def test_where_blocks_are_the_models_own_the_cache_of_all_but_the_block_is_exact_too(data: st.DataObject) -> None:
    case = data.draw(cases("sdar", SAMPLERS | REVISING))
    rows = [case.row(cache) for cache in (CacheMode.PREFIX, CacheMode.DUAL)]
    for row in rows:
        loop.finish([row], MODELS["sdar"].predict)
    assert told(rows[0]) == told(rows[1])


def row_of(model: str, prompt: int, gen_length: int, cache: CacheMode, block_length: int | None = None) -> Row:
    """A generation after a prompt of so many tokens, one token a forward."""
    topk = get_sampler("topk")
    pattern = MODELS[model].info.pattern
    canvas = Canvas.blank(list(range(5, 5 + prompt)), gen_length, MASK, block_length, pattern=pattern)
    return Row(canvas, topk, topk.Params(), cache=cache)


def watched(backend: TorchBackend, row: Row) -> list[int]:
    """Tokens that the network computes in each forward of a generation; what the loop says it spans is just that."""
    computed: list[int] = []
    embedding = backend.network.get_submodule("model.embed_tokens")
    hook = embedding.register_forward_hook(lambda _, __, out: computed.append(len(out)))
    said = []

    def predict(query: Query) -> Prediction:
        said.extend(span.stop - span.start for span in query.spans)
        return backend.predict(query)

    loop.finish([row], predict)
    hook.remove()
    assert computed == said
    return computed


@pytest.mark.parametrize(
    ("model", "prompt", "length", "block", "cache", "expected"),
    [
        # The prompt's whole blocks are computed with the first block, and each block once more with the next one.
        ("sdar", 9, 11, None, "none", [12, 12, 12, 16, 16, 16, 16, 20, 20, 20, 20]),
        ("sdar", 9, 11, None, "prefix", [12, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]),
        ("sdar", 9, 11, None, "dual", [12, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]),
        ("sdar", 8, 4, None, "prefix", [12, 4, 4, 4]),
        ("sdar", 9, 9, 6, "prefix", [12, 6, 6, 12, 6, 6, 6, 6, 6]),
        # A block that begins with a mask is opened by the one before it, without being computed itself. The model's
        # last block is there as a whole, also where the text ends within it.
        ("fast_dllm_v2", 6, 6, 4, "none", [8, 8, 8, 16, 16, 16]),
        ("fast_dllm_v2", 6, 6, 4, "prefix", [8, 8, 8, 8, 8, 8]),
        ("fast_dllm_v2", 16, 8, 8, "prefix", [16, 8, 8, 8, 8, 8, 8, 8]),
        # Full forwards of a block until the first token of the small one is there.
        ("fast_dllm_v2", 3, 5, 2, "dual", [8, None, None, None, None]),
        ("fast_dllm_v2", 0, 2, 2, "dual", [8, 2]),
    ],
)
def test_what_a_forward_computes(
    model: str, prompt: int, length: int, block: int | None, cache: str, expected: list[int | None]
) -> None:
    """A generation costs the scheduler what the network computes for it: finished blocks no more than twice."""
    row = row_of(model, prompt, length, CacheMode(cache), block)
    found = watched(MODELS[model], row)
    assert len(found) == len(expected)
    assert all(wanted in (None, count) for count, wanted in zip(found, expected, strict=True)), found


def test_small_blocks_are_computed_alone_once_their_first_token_is_there() -> None:
    row = row_of("fast_dllm_v2", 9, 15, CacheMode.DUAL, 4)
    block: list[tuple[int, bool, int]] = []

    def predict(query: Query) -> Prediction:
        place = row.canvas.layout.block_place(row.block)
        known = place < 9 or not bool(row.canvas.masked[place - 9])
        block.append((place, known, query.spans[0].stop - query.spans[0].start))
        return MODELS["fast_dllm_v2"].predict(query)

    loop.finish([row], predict)
    first = block.index(next(each for each in block if each[0] == 12))
    assert block[0] == (8, True, 16), "everything, since nothing is known"
    assert {fed for _, _, fed in block[1:first]} == {4}
    seconds = [each for each in block if each[0] == 12]
    assert seconds[0] == (12, False, 8) and all(fed == (4 if known else 8) for _, known, fed in seconds)
    thirds = [each for each in block if each[0] == 16]
    assert [fed for _, _, fed in thirds[:2]] == [8, 8], "opened by the block before it, then all of its own block"
    assert all(known and fed == 4 for _, known, fed in thirds[2:])


@pytest.mark.parametrize("model", MODELS)
def test_bit_for_bit_whatever_shares_the_batch(model: str) -> None:
    """Committed probabilities alone, with others, and with others that come in mid-run."""
    made_again = {"sdar": (SDAR, 1, {}), "sdar_moe": (SDAR_MOE, 2, {}), "fast_dllm_v2": (FAST_DLLM, 3, {"bd_size": 8})}
    architecture, seed, changes = made_again[model]
    backend = made(architecture, seed, batch_invariant=True, **changes)

    def confidences(others: int, late: int = 0) -> list[tuple[list[int], list[float]]]:
        mine = row_of(model, 10, 14, CacheMode.PREFIX)
        caches = [CacheMode.NONE, CacheMode.PREFIX, CacheMode.DUAL]
        rest = [row_of(model, 4 + 3 * i, 12 + i, caches[i % 3]) for i in range(others)]
        found: list[tuple[list[int], list[float]]] = []

        def live() -> list[Row]:
            if mine.finished:
                return []
            there = [row for i, row in enumerate(rest) if not row.finished and (len(found) >= late or i == 0)]
            return sorted([mine, *there], key=lambda row: row.canvas.layout.prompt_length)

        for turn in loop.run(live, backend.predict):
            (event,) = (event for row, event in turn if row is mine)
            found.append((event.positions, event.confidences))
        return found

    alone = confidences(0)
    assert len(alone) == 14
    assert confidences(2) == confidences(6) == confidences(6, late=3) == alone


@pytest.mark.parametrize("model", MODELS)
def test_one_that_is_cancelled_in_mid_run_leaves_the_others_alone(model: str) -> None:
    expected = [row_of(model, 7 + i, 14, CacheMode.PREFIX) for i in range(3)]
    for row in expected:
        loop.finish([row], MODELS[model].predict)
    engine = Engine(TorchBackend(MODELS[model].network, MODELS[model].info), Metrics("test"))
    topk = get_sampler("topk")
    requests = [
        GenerationRequest(row.canvas.tokens[: 7 + i].tolist(), 14, topk, topk.Params(), cache=CacheMode.PREFIX)
        for i, row in enumerate(expected)
    ]
    listeners = [Listener() for _ in requests]
    submitted = threading.Event()

    def cancel_in_the_midst(event: Event) -> None:
        listeners[1](event)
        assert submitted.wait(timeout=30)
        if len(listeners[1].commits) == 4:
            engine.cancel(generations[1])

    engine.start()
    generations = engine.submit_all(requests, [listeners[0], cancel_in_the_midst, listeners[2]])
    submitted.set()
    reasons = [each.finish().reason for each in listeners]
    engine.stop()
    assert reasons == [FinishReason.LENGTH, FinishReason.ABORT, FinishReason.LENGTH]
    assert len(listeners[1].commits) == 4
    for i in (0, 2):
        assert listeners[i].text() == expected[i].told
        assert listeners[i].finish().forwards == expected[i].forwards
