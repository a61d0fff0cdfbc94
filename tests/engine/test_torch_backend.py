"""Our model behind the engine: what is computed, for whom, and that the batch does not matter."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from samplers import Canvas, Statistic, TokenChoice, get_sampler
from samplers.denoising import Denoising, ask, denoise
from samplers.prediction import summarise
from server.engine import Backend, torch_backend
from server.engine.torch_backend import TorchBackend, gather, pad
from server.models.loading import load_model


@pytest.fixture(scope="module")
def backend(tiny_model: Path) -> TorchBackend:
    backend = load_model(str(tiny_model), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend)
    return backend


def rows(count: int, temperature: float = 0.0) -> list[Denoising]:
    """Generations that differ in prompt, length, block, sampler and seed."""
    found = []
    for i in range(count):
        sampler = get_sampler(("topk", "threshold", "random")[i % 3])
        canvas = Canvas.blank(list(range(5, 8 + i)), 10 + 2 * i, 0, (None, 8)[i % 2])
        found.append(Denoising(canvas, sampler, sampler.Params(), TokenChoice(temperature), seed=i))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_batch_of_one_equals_a_batch_of_eight(backend: TorchBackend, temperature: float) -> None:
    together = rows(8, temperature)
    denoise(together, backend.predict)
    for expected, row in zip(together, rows(8, temperature), strict=True):
        denoise([row], backend.predict)
        assert row.canvas.tokens.equal(expected.canvas.tokens)
        assert row.forwards == expected.forwards


def test_padding_changes_no_prediction(backend: TorchBackend) -> None:
    long, short = rows(2)
    together = backend.predict(ask([short, long]))
    alone = backend.predict(ask([short]))
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
    query = ask(asked)
    candidates = sum(len(row.candidates()) for row in asked)
    assert candidates < sum(row.canvas.layout.length for row in asked)
    backend.predict(query)
    width, vocabulary = backend.network.config.d_model, backend.info.vocab_size
    assert seen == [("head", (candidates, width)), ("statistics", (candidates, vocabulary))]


def test_many_candidates_are_worked_off_in_parts(backend: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rows(4, temperature=0.5)
    query = ask(asked)
    query = type(query)(query.canvases, query.row, query.position, frozenset(Statistic), query.choices, query.uniform)
    whole = backend.predict(query)
    monkeypatch.setattr(torch_backend, "LOGIT_ELEMENTS", 7 * backend.info.vocab_size)
    parts = backend.predict(query)
    assert parts.token.equal(whole.token)
    assert torch.allclose(parts.confidence, whole.confidence, atol=1e-6)
    for name in Statistic:
        assert torch.allclose(parts.extra[name], whole.extra[name], atol=1e-5)


def test_predictions_are_those_of_the_whole_forward(backend: TorchBackend) -> None:
    asked = rows(3)
    query = ask(asked)
    found = backend.predict(query)
    logits = torch.cat(
        [
            backend.network(row.canvas.tokens[None])[0, row.canvas.layout.prompt_length + row.candidates()]
            for row in asked
        ]
    )
    expected = summarise(logits, backend.info.mask_id, frozenset())
    assert found.token.equal(expected.token)
    assert torch.allclose(found.confidence, expected.confidence, atol=1e-6)


def test_candidates_as_a_grid() -> None:
    wanted, place = gather(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([3, 5, 1, 2, 7]), 4)
    assert wanted.tolist() == [[3, 5, 0], [0, 0, 0], [1, 2, 7], [0, 0, 0]]
    assert place.tolist() == [0, 1, 0, 1, 2]


def test_the_last_block_works_on_candidates_only(backend: TorchBackend) -> None:
    asked = rows(4)
    query = ask(asked)
    most = max(len(row.candidates()) for row in asked)
    longest = max(row.canvas.layout.length for row in asked)
    shapes: list[torch.Size] = []
    blocks = backend.network.transformer.blocks
    hooks = [block.ff_out.register_forward_hook(lambda _, __, out: shapes.append(out.shape)) for block in blocks]
    backend.predict(query)
    for hook in hooks:
        hook.remove()
    assert [shape[1] for shape in shapes] == [longest] * (len(blocks) - 1) + [most]
    assert most < longest


def test_equal_lengths_need_no_mask() -> None:
    tokens, valid = pad([Canvas.blank([1, 2], 3, 0), Canvas.blank([1], 4, 0)])
    assert tokens.tolist() == [[1, 2, 0, 0, 0], [1, 0, 0, 0, 0]] and valid is None
    tokens, valid = pad([Canvas.blank([1, 2], 3, 0), Canvas.blank([1], 2, 0)])
    assert valid is not None and valid.tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_generations_end_at_the_models_end_of_text(ending_model: Path) -> None:
    backend = load_model(str(ending_model), device="cpu", dtype="float32").backend
    ended = []
    for i in range(6):
        sampler = get_sampler(("topk", "threshold")[i % 2])
        canvas = Canvas.blank([5 + i] * 6, 40, 0, 8)
        ended.append(
            Denoising(canvas, sampler, sampler.Params(), TokenChoice(1.0), seed=i, end_ids=backend.info.end_ids)
        )
    denoise(ended, backend.predict)
    assert sum(row.end is not None for row in ended) >= 4
    for row in ended:
        assert 1 not in row.text_tokens()
        assert row.end is None or row.completion_tokens == row.end + 1 < 40


def test_it_is_a_backend(backend: TorchBackend) -> None:
    seam: Backend = backend
    assert seam.info.device == "cpu" and seam.info.dtype == "float32"
