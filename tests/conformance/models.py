"""The model under test, on either engine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samplers import CacheMode, Canvas
from samplers.forward.query import Query
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import StatisticsRequest
from server.backends.loading import ModelError, build_network, describe, load_network
from server.backends.torch.backend import TorchBackend
from server.backends.vllm.backend import VllmBackend, VllmError
from server.engine import Backend
from server.models.checkpoint.packing import pack_linear_layers
from tests.conformance.report import NotBuilt


def open_backend(folder: Path, engine: str, settings: dict[str, Any] | None = None) -> Backend:
    """Our model of a checkpoint, in full precision on the processor. Raises NotBuilt if there is none.

    Args:
        settings: entries in place of those of `config.json`.
    """
    try:
        if engine == "torch":
            architecture, _, network = load_network(folder, torch.device("cpu"), torch.float32, settings)
            pack_linear_layers(network)
            return TorchBackend(network, describe(architecture, network))
        architecture, _, network = build_network(folder, settings)
        return VllmBackend(folder, describe(architecture, network))
    except (ModelError, VllmError) as error:
        raise NotBuilt(str(error).rpartition("config.json: ")[2]) from None


def check_cache(backend: Backend, mode: CacheMode) -> None:
    """Raises NotBuilt for a cache that the engine does not have."""
    if mode not in backend.info.caches:
        raise NotBuilt(f"{mode} cache on this engine")


def query_logits(backend: Backend, query: Query) -> Tensor:
    """Logits of the positions of a query, [n, vocab].

    An engine that gives no logits gives the probabilities of named tokens. All of them are as good: their logarithms
    are the logits but for one number a row, which no softmax, argmax or guidance can tell.
    """
    if isinstance(backend, TorchBackend):
        batch, back = backend.pack(query)
        return backend.network.head(backend.network.packed(batch)[back])
    named = torch.arange(backend.info.vocab_size).expand(len(query.row), -1)
    said = backend.predict(replace(query, wanted=StatisticsRequest(named=named))).named
    assert said is not None
    return said.log()


def fed_logits(backend: Backend, canvases: Sequence[Canvas], spans: Sequence[ForwardSpan]) -> Tensor:
    """Logits of everything that is fed, [rows, most fed, vocab], filled up with zeros at the right.

    They are the outputs at those positions, also where a model's output is about the next one.
    """
    counts = [feed.stop - feed.start for feed in spans]
    row = torch.arange(len(spans)).repeat_interleave(torch.tensor(counts))
    position = torch.cat([torch.arange(feed.start, feed.stop) for feed in spans])
    query = Query(list(canvases), list(spans), row, position + int(backend.info.pattern.shifted))
    return torch.nn.utils.rnn.pad_sequence(query_logits(backend, query).split(counts), batch_first=True)
