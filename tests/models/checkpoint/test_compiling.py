"""Compiled layers: few shapes, no falling back, the same predictions."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.loading import describe, load_network
from server.backends.torch.backend import TorchBackend
from server.models.checkpoint.compiling import SMALLEST, compile_layers, padded_size, shapes_up_to


@given(st.integers(1, 1 << 20))
def test_padding_is_little_and_shapes_are_few(count: int) -> None:
    size = padded_size(count)
    assert count <= size and (size == SMALLEST or size < 1.25 * count + 1)
    assert padded_size(size) == size


def test_the_number_of_shapes() -> None:
    assert shapes_up_to(8192) == len({padded_size(count) for count in range(1, 8193)}) == 29


@pytest.fixture(scope="module")
def backends(tiny_model: Path) -> tuple[TorchBackend, TorchBackend]:
    """Plain, and with every shape traced once: the compiler's front is real, its code generator is left out."""
    architecture, _, network = load_network(tiny_model, torch.device("cpu"), torch.float32)
    info = describe(architecture, network)
    traced = deepcopy(network)
    compile_layers(traced, 1024, backend="eager")
    return TorchBackend(network, info), TorchBackend(traced, info, static_shapes=True)


def rows(count: int, extra: int) -> list[Row]:
    topk = get_sampler("topk")
    return [Row(Canvas.blank([5 + i] * (3 + i + extra), 20 + i, 0, 8), topk, topk.Params()) for i in range(count)]


def test_compiled_forwards_say_the_same_with_few_shapes(backends: tuple[TorchBackend, TorchBackend]) -> None:
    from torch._dynamo.utils import counters

    plain, compiled = backends
    counters.clear()
    shapes = set()
    for count, extra in ((1, 0), (1, 9), (3, 0), (3, 2), (3, 3), (7, 1), (7, 2)):
        query = next_query(rows(count, extra))
        batch, _ = compiled.pack(query)
        shapes.add((len(batch.tokens), len(batch.wanted)))
        ours, theirs = compiled.predict(query), plain.predict(query)
        assert ours.token.equal(theirs.token)
        assert torch.allclose(ours.confidence, theirs.confidence, atol=1e-5)
    assert 1 < len(shapes) < 7
    assert not counters["graph_break"]
    # Before and after attention; in all layers but the last, and in the last.
    assert counters["stats"]["unique_graphs"] <= 4 * len(shapes)
