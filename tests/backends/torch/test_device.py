"""The path of other devices than the processor, on one whose tensors have shapes but no content.

Whatever would wait for a device needs content, and fails here: a step may read only what it hands over at its end.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from samplers import CacheMode, Canvas, TokenChoice, list_samplers
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.loading import describe, load_network
from server.backends.torch.backend import TorchBackend


class Watched(TorchBackend):
    """Stops where the one copy to the processor would be."""

    def predict(self, query: Query) -> Prediction:
        with torch.no_grad():
            return self._together(query)


@pytest.fixture
def empty(tiny_model: Path) -> Watched:
    architecture, _, network = load_network(tiny_model, torch.device("cpu"), torch.float32)
    info = replace(describe(architecture, network), device="meta")
    return Watched(network.to("meta"), info)


@pytest.mark.parametrize("cache", list(CacheMode))
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nothing_waits_for_the_device(empty: Watched, cache: CacheMode, temperature: float) -> None:
    rows = []
    for i, sampler in enumerate(list_samplers()):
        if sampler.requires or sampler.drafts:  # which needs something else, or another kind of model
            continue
        choice = TokenChoice() if sampler.chooses_tokens else TokenChoice(temperature, 0.9, 5)
        canvas = Canvas.blank([5] * (4 + i % 3), 12 + i % 2, 0, 4)
        rows.append(Row(canvas, sampler, sampler.Params(), choice, seed=i, cache=cache))
    query = next_query(rows)
    said = empty.predict(query)
    assert said.token.device.type == said.confidence.device.type == "meta"
    assert len(said.token) == len(query.row)
    assert {len(values) for values in said.extra.values()} == {len(query.row)} and said.extra
