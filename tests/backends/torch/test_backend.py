"""Our model behind the engine: what is computed, for whom, and that the batch does not matter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import CacheMode, Canvas, Statistic, TokenChoice, get_sampler
from samplers.forward.query import Query
from samplers.forward.span import ForwardSpan, KVSlot
from samplers.forward.summary import summarise
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query, run
from server.backends.loading import load_model
from server.backends.torch import backend as torch_backend
from server.backends.torch.backend import TorchBackend
from server.engine import Backend


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> TorchBackend:
    backend = load_model(str(tiny_model), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend)
    return backend


def rows(count: int, temperature: float = 0.0) -> list[Row]:
    """Generations that differ in prompt, length, block, sampler and seed."""
    found = []
    for i in range(count):
        sampler = get_sampler(("topk", "threshold", "random")[i % 3])
        canvas = Canvas.blank(list(range(5, 8 + i)), 10 + 2 * i, 0, (None, 8)[i % 2])
        found.append(Row(canvas, sampler, sampler.Params(), TokenChoice(temperature), seed=i))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_batch_of_one_equals_a_batch_of_eight(backend: TorchBackend, temperature: float) -> None:
    together = rows(8, temperature)
    finish(together, backend.predict)
    for expected, row in zip(together, rows(8, temperature), strict=True):
        finish([row], backend.predict)
        assert row.canvas.tokens.equal(expected.canvas.tokens)
        assert row.forwards == expected.forwards


def test_a_row_of_another_length_changes_no_prediction(backend: TorchBackend) -> None:
    long, short = rows(2)
    together = backend.predict(next_query([short, long]))
    alone = backend.predict(next_query([short]))
    count = len(alone.token)
    assert together.token[:count].equal(alone.token)
    assert torch.allclose(together.confidence[:count], alone.confidence, atol=1e-6)


def test_head_and_statistics_are_computed_for_candidates_only(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = rows(4)
    seen: list[tuple[str, tuple[int, ...]]] = []
    head = backend.network.head

    def watched_head(hidden: Tensor) -> Tensor:
        seen.append(("head", tuple(hidden.shape)))
        return head(hidden)

    def watched_summary(logits: Tensor, *arguments: object) -> object:
        seen.append(("statistics", tuple(logits.shape)))
        return summarise(logits, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backend.network, "head", watched_head)
    monkeypatch.setattr(torch_backend, "summarise", watched_summary)
    query = next_query(asked)
    candidates = sum(len(row.candidates()) for row in asked)
    assert candidates < sum(row.canvas.layout.length for row in asked)
    backend.predict(query)
    width, vocabulary = backend.network.config.d_model, backend.info.vocab_size
    assert seen == [("head", (candidates, width)), ("statistics", (candidates, vocabulary))]


def test_many_candidates_are_worked_off_in_parts(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rows(4, temperature=0.5)
    query = next_query(asked)
    query = replace(query, wanted=replace(query.wanted, statistics=frozenset(Statistic)))
    whole = backend.predict(query)
    monkeypatch.setattr(torch_backend, "LOGIT_ELEMENTS", 7 * backend.info.vocab_size)
    parts = backend.predict(query)
    assert parts.token.equal(whole.token)
    assert torch.allclose(parts.confidence, whole.confidence, atol=1e-6)
    for name in Statistic:
        assert torch.allclose(parts.extra[name], whole.extra[name], atol=1e-5)


def test_predictions_are_those_of_the_whole_forward(backend: TorchBackend) -> None:
    asked = rows(3)
    query = next_query(asked)
    found = backend.predict(query)
    logits = torch.cat(
        [
            backend.network(row.canvas.tokens[None])[0, row.canvas.layout.prompt_length + row.candidates()]
            for row in asked
        ]
    )
    expected = summarise(logits, backend.info.mask_id)
    assert found.token.equal(expected.token)
    assert torch.allclose(found.confidence, expected.confidence, atol=1e-6)


def test_nothing_is_computed_of_padding_and_the_last_block_works_on_candidates_only(backend: TorchBackend) -> None:
    asked = rows(4)
    query = next_query(asked)
    candidates = sum(len(row.candidates()) for row in asked)
    everything = sum(row.canvas.layout.length for row in asked)
    shapes: list[torch.Size] = []
    blocks = backend.network.transformer.blocks
    hooks = [block.ff_out.register_forward_hook(lambda _, __, out: shapes.append(out.shape)) for block in blocks]
    backend.predict(query)
    for hook in hooks:
        hook.remove()
    assert [shape[0] for shape in shapes] == [everything] * (len(blocks) - 1) + [candidates]
    assert candidates < everything


@pytest.mark.parametrize("mode", [CacheMode.PREFIX, CacheMode.DUAL])
def test_with_a_cache_only_a_block_or_what_follows_it_is_computed(backend: TorchBackend, mode: CacheMode) -> None:
    sampler = get_sampler("topk")
    row = Row(Canvas.blank([5, 6, 7], 24, 0, 8), sampler, sampler.Params(k=3), cache=mode)
    fed: list[int] = []
    first = backend.network.transformer.blocks[0]
    hook = first.ff_out.register_forward_hook(lambda _, __, out: fed.append(len(out)))
    finish([row], backend.predict)
    hook.remove()
    rest = [24, 16, 8] if mode is CacheMode.PREFIX else [8] * 3
    assert fed == [n for part in rest for n in (27, part, part)]


def test_a_cache_that_knows_everything_is_exact(backend: TorchBackend) -> None:
    """What a forward left, unchanged: any part fed again gives the same prediction."""
    (row,) = rows(1)
    query, memory = next_query([row]), KVSlot()
    start, length = int(query.position[0]), row.canvas.layout.length
    whole = backend.predict(replace(query, spans=[ForwardSpan(0, length, memory)]))
    again = backend.predict(replace(query, spans=[ForwardSpan(start, length - 1, memory)], **_without_last(query)))
    assert again.token.equal(whole.token[:-1])
    assert torch.allclose(again.confidence, whole.confidence[:-1], atol=1e-6)


def _without_last(query: Query) -> dict[str, Any]:
    return {"row": query.row[:-1], "position": query.position[:-1], "wanted": query.wanted.part(0, len(query.row) - 1)}


def test_caches_of_generations_that_began_at_different_times(backend: TorchBackend) -> None:
    """Alone or together, whole forwards beside parts of others: the same tokens, the same number of forwards."""
    modes = [CacheMode.DUAL, CacheMode.NONE, CacheMode.PREFIX]

    def made() -> list[Row]:
        found = rows(9, temperature=0.4)
        return [
            Row(
                Canvas.blank(row.canvas.tokens[: row.canvas.layout.prompt_length].tolist(), 20 + i, 0, 6),
                row.sampler,
                row.params,
                row.choice,
                seed=i,
                cache=modes[i // 3],
            )
            for i, row in enumerate(found)
        ]

    together = made()
    late = together[::2]
    for _ in zip(range(3), run(together[1::2], backend.predict), strict=False):
        pass
    finish([*late, *together[1::2]], backend.predict)
    for expected, row in zip(together, made(), strict=True):
        finish([row], backend.predict)
        assert row.canvas.tokens.equal(expected.canvas.tokens)
        assert row.forwards == expected.forwards


def test_generations_end_at_the_models_end_of_text(ending_model: Path) -> None:
    backend = load_model(str(ending_model), device="cpu", dtype="float32").backend
    ended = []
    for i in range(6):
        sampler = get_sampler(("topk", "threshold")[i % 2])
        canvas = Canvas.blank([5 + i] * 6, 40, 0, 8)
        ended.append(Row(canvas, sampler, sampler.Params(), TokenChoice(1.0), seed=i, end_ids=backend.info.end_ids))
    finish(ended, backend.predict)
    assert sum(row.end is not None for row in ended) >= 4
    for row in ended:
        assert 1 not in row.text_tokens()
        assert row.end is None or row.completion_tokens == row.end + 1 < 40


def test_it_is_a_backend(backend: TorchBackend) -> None:
    seam: Backend = backend
    assert seam.info.device == "cpu" and seam.info.dtype == "float32"


def test_batch_invariance_is_bit_for_bit(tiny_model: Path) -> None:
    """Committed probabilities alone, with 2 and 7 others, and with arrivals in mid-run."""
    backend = load_model(str(tiny_model), device="cpu", dtype="float32", batch_invariant=True).backend

    def confidences(count: int, late: int = 0) -> list[tuple[list[int], list[float]]]:
        modes = [CacheMode.NONE, CacheMode.DUAL, CacheMode.PREFIX]
        running = [replace(row, cache=modes[i % 3]) for i, row in enumerate(rows(count, temperature=0.6))]
        watched = running[1 % count]
        told: list[tuple[list[int], list[float]]] = []

        def live() -> list[Row]:
            if watched.finished:
                return []
            there = enumerate(running)
            return [r for i, r in there if not r.finished and (r is watched or i < 2 or len(told) >= late)]

        for turn in run(live, backend.predict):
            (event,) = (event for row, event in turn if row is watched)
            told.append((event.positions, event.confidences))
        return told

    reference = confidences(2)
    assert len(reference) > 3
    for count, late in ((3, 0), (8, 0), (8, 2)):
        assert confidences(count, late) == reference
