"""The path of other devices than the processor, without one.

On a device whose tensors have shapes but no content, whatever would wait for it fails: a forward may read only what it
hands over at its end. On one whose tensors have content, but meet none of the processor's, whole generations are run.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from policies.network.policy_network import LoadedPolicy
from samplers import CacheMode, Canvas, ParameterError, Sampler, TokenChoice, get_modifier, list_samplers
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.learned.policy import Policy
from samplers.loop.batch import Batch
from samplers.loop.row import Row
from samplers.loop.run import Loop, finish, next_query, run
from samplers.resources import DEFAULT, bound
from server.backends.loading import describe, load_network
from server.backends.torch.backend import TorchBackend
from tests.backends.torch.elsewhere import ASKED, Device, move
from tests.engine.test_block_causal import MODELS as BLOCK_CAUSAL
from tests.engine.test_differential import MODELS
from tests.models.families.test_diffusion_gemma import small
from tests.policies import tiny


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


BACKENDS = {
    "llada": MODELS[0],
    "dream": MODELS[3],
    "sdar": BLOCK_CAUSAL["sdar"],
    "fast_dllm_v2": BLOCK_CAUSAL["fast_dllm_v2"],
    "diffusion_gemma": small(),
}
AROUND: list[tuple[str, dict[str, Any]]] = [("guidance", {"scale": 0.5}), ("spacing", {}), ("credit", {})]


def every_kind_of_row(backend: TorchBackend, cache: CacheMode, policy: Sampler) -> list[Row]:
    """Each sampler alone and with each modifier around it, greedy and drawing, as far as that goes together."""
    pattern, found = backend.info.pattern, []
    for i, (sampler, around) in enumerate(zip((*list_samplers(), policy), cycle((None, *AROUND)), strict=False)):
        if "policy" in sampler.requires and sampler is not policy:
            continue
        params = sampler.Params(**({"policy": "p"} if sampler is policy else {}))
        rule = sampler if sampler is policy else bound(sampler, params, DEFAULT)
        modifiers = [] if around is None else [(get_modifier(around[0]), get_modifier(around[0]).Params(**around[1]))]
        draws = not rule.chooses_tokens and not any(each.chooses_tokens for each, _ in modifiers)
        block = None if pattern.noise is not None else 4
        canvas = Canvas.blank([5, 6, 7 + i % 3][: 2 + i % 2], 6 + i % 5, backend.info.mask_id, block, pattern=pattern)
        choice = TokenChoice(0.7 if draws and i % 2 else 0.0, 0.9, 5)
        try:
            found.append(Row(canvas, rule, params, choice, i, frozenset({9}), cache=cache, modifiers=modifiers))
        except ParameterError:  # of another kind of model, or not to be combined
            continue
    return found


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Views of tensors that are not torch's own cannot be made in inference mode.
    for owner, name in ((Loop, "step"), (TorchBackend, "predict")):
        monkeypatch.setattr(owner, name, torch.no_grad()(getattr(owner, name).__wrapped__))
    with Device():
        yield


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "cache"), list(zip(BACKENDS, cycle((CacheMode.PREFIX, CacheMode.DUAL)), strict=False))
)
def test_whole_generations_never_mix_devices(name: str, cache: CacheMode) -> None:
    """Rows that join at different times, and leave; the tokens are those of the processor."""
    backend = BACKENDS[name]
    network = deepcopy(backend.network)
    move(network)
    there = TorchBackend(network, replace(backend.info, device=ASKED))
    policy = tiny.network(region=True)
    expected = every_kind_of_row(backend, cache, Policy(LoadedPolicy(deepcopy(policy))))
    move(policy)
    rows = every_kind_of_row(backend, cache, Policy(LoadedPolicy(policy)))
    finish(expected, backend.predict)
    assert len(rows) >= (1 if name == "diffusion_gemma" else 8)
    batch, turns = Batch(there.info.loop_device), count()

    def taking() -> list[Row]:
        turn = next(turns)
        for row in rows:
            if row.finished and row.batch is batch:
                row.release()
        return [row for i, row in enumerate(rows) if i <= 5 * turn and not row.finished]

    for turn in run(taking, there.predict, batch=batch):
        assert [event.error for _, event in turn if event.error is not None] == []
    assert [row.told for row in rows] == [row.told for row in expected]
    assert [row.canvas.tokens.tolist() for row in rows] == [row.canvas.tokens.tolist() for row in expected]
    assert not any(batch.rows)
