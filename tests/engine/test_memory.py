"""What serving takes at most is known before the first request."""

import threading
from pathlib import Path

import pytest
import torch

from samplers import get_sampler
from server.allocator import available_memory, peak_memory
from server.engine import Engine, Finished, GenerationRequest, Limits
from server.engine import memory as memory_module
from server.engine.memory import TooLittleMemoryError, bound_memory
from server.engine.request import Event
from server.engine.torch_backend import TorchBackend
from server.metrics import Metrics
from server.models.loading import load_model
from tests.tiny import write_tiny_model
from tests.tiny_gemma import write_tiny_gemma

CPU = torch.device("cpu")


@pytest.fixture
def backend(tmp_path: Path) -> TorchBackend:
    shape = {"d_model": 256, "mlp_hidden_size": 768, "max_sequence_length": 1024}
    folder = write_tiny_model(tmp_path / "larger", **shape)
    backend = load_model(str(folder), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend)
    return backend


def test_many_queued_requests_stay_within_the_bound(backend: TorchBackend) -> None:
    limits = Limits(rows=16, queue=64, tokens=4096)
    bound = bound_memory(backend, limits)
    engine = Engine(backend, Metrics("x"), limits)
    engine.start()
    topk, done = get_sampler("topk"), threading.Semaphore(0)

    def deliver(event: Event) -> None:
        if isinstance(event, Finished):
            done.release()

    requests = [GenerationRequest([5] * 24, 1000, "topk", topk.Params(steps=1)) for _ in range(64)]
    with peak_memory(CPU) as peak:
        engine.submit_all(requests, [deliver] * len(requests))
        for _ in requests:
            assert done.acquire(timeout=60)
    engine.stop()
    assert 0.5 * bound.forward < peak.grown < 1.5 * bound.forward + 16e6, (peak.grown, bound.forward)


def test_the_bound_grows_with_the_limits(backend: TorchBackend) -> None:
    small, large = (bound_memory(backend, Limits(rows=rows, tokens=tokens)) for rows, tokens in ((2, 512), (8, 4096)))
    assert large.forward > 2 * small.forward
    numbers = sum(2 * heads * size for heads, size in backend.network.cache_shapes)
    assert small.cache == 2 * 512 * numbers * 4
    assert large.cache == 8 * 1024 * numbers * 4
    assert small.weights == large.weights == backend.info.parameters * 4


def test_a_model_without_a_mask_token_has_a_bound(tmp_path: Path) -> None:
    """Layers whose keys differ in shape; the largest forward drafts all there is, which is more than a canvas."""
    backend = load_model(str(write_tiny_gemma(tmp_path)), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend)
    bound = bound_memory(backend, Limits(rows=2, tokens=256))
    assert bound.cache == 2 * 128 * 4 * (2 * 2 * (2 * 8) + 2 * (1 * 16))


@pytest.mark.parametrize("available", [1_000_000, 40_000_000])
def test_what_does_not_fit_is_refused_with_numbers(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch, available: int
) -> None:
    """Before the forward that would not fit, if that is plain, else after it."""
    monkeypatch.setattr(memory_module, "available_memory", lambda device: available)
    with pytest.raises(TooLittleMemoryError) as refused:
        bound_memory(backend, Limits(rows=16, tokens=4096))
    message = str(refused.value)
    assert "--max-batch-tokens 4096" in message and "--max-batch 16" in message
    assert f"only {available / 1e6:,.0f} MB are left" in message and ("at least" in message) == (available < 2e6)


def test_available_memory_is_some_of_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_memory(CPU) < total
