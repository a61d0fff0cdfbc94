"""The policy network and what it reads."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from policies.network import features
from policies.network.config import PolicyConfig
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy, parameters, waves
from samplers import Canvas, Selection, Step
from samplers.loop.row import Row
from samplers.loop.run import finish
from tests.policies.network.steps import random_step, row_of
from tests.policies.tiny import RICH, network, sampler
from tests.samplers.models import MASK, VOCAB, predictor

LENGTHS = [6, 8, 10, 12, 14, 16, 18, 20]


def test_the_papers_size() -> None:
    assert parameters(UnmaskingPolicy(PolicyConfig())) == 331_265


def test_it_starts_at_its_bias_and_does_not_see_the_mask_yet() -> None:
    torch.manual_seed(0)
    made = UnmaskingPolicy(PolicyConfig(output_bias=-2.0))
    logits = made(torch.rand(2, 5, 1), torch.ones(2, 5).bool(), torch.ones(2, 5).bool(), torch.zeros(2))
    assert (logits + 2).abs().max() < 1.0
    assert float(torch.sigmoid(torch.tensor(-2.0))) == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize("region", [True, False])
@pytest.mark.parametrize("features", [RICH, {"features": ["confidence"]}])
def test_logits_do_not_depend_on_the_batch(features: dict[str, object], region: bool) -> None:
    """Alone, among eight, and padded to twice the length: within 1e-5."""
    loaded = LoadedPolicy(network(**features, region=region))
    step = random_step(loaded.network.config, LENGTHS, 0.6)
    together = loaded.score(step, None)
    for i, length in enumerate(LENGTHS):
        alone = loaded.score(row_of(step, i, length), None)
        assert alone.shape == (1, length)
        assert torch.allclose(together[i, :length], alone[0], atol=1e-5)
    assert together.shape[1] >= 2 * LENGTHS[0]


def test_every_input_matters() -> None:
    net = network(takes_speed=True, tokens=VOCAB)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    given = {
        "features": torch.rand(1, 4, 1, generator=torch.Generator().manual_seed(0)),
        "masked": everywhere,
        "valid": everywhere,
        "time": torch.tensor([0.2]),
        "speed": torch.tensor([0.5]),
        "tokens": torch.tensor([[1, 2, 3, 4]]),
    }
    base = net(**given)
    others = {
        "features": given["features"] * 0.9,
        "masked": torch.tensor([[True, False, True, True]]),
        "valid": torch.tensor([[True, True, True, False]]),
        "time": torch.tensor([0.4]),
        "speed": torch.tensor([0.7]),
        "tokens": torch.tensor([[1, 2, 3, 5]]),
    }
    for name, value in others.items():
        assert not torch.allclose(net(**{**given, name: value})[:, :3], base[:, :3], atol=1e-4), name


def test_more_speed_is_bolder_from_the_start() -> None:
    torch.manual_seed(0)
    net = UnmaskingPolicy(PolicyConfig(hidden=16, feedforward=16, takes_speed=True))
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    logits = [
        net(torch.rand(1, 4, 1), everywhere, everywhere, torch.zeros(1), torch.tensor([speed])).mean()
        for speed in (0.0, 0.5, 1.0)
    ]
    assert logits[0] + 1 < logits[1] < logits[2] - 1


def test_missing_inputs_are_named() -> None:
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    rest = (torch.rand(1, 4, 1), everywhere, everywhere, torch.zeros(1))
    with pytest.raises(ValueError, match="reads tokens"):
        network(tokens=5)(*rest)
    with pytest.raises(ValueError, match="takes a speed"):
        network(takes_speed=True)(*rest)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"features": []}, "at least 1 item"),
        ({"features": ["confidence", "confidence"]}, "named twice"),
        ({"features": ["top_logs"], "top": 1}, "top of at least 2"),
        ({"features": ["smell"]}, "Input should be"),
        ({"hidden": 10, "heads": 4}, "even size"),
        ({"action": "argmax"}, "Input should be"),
        ({"size": 3}, "Extra inputs"),
    ],
)
def test_configurations_that_do_not_fit(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PolicyConfig.model_validate(config)


@settings(max_examples=20)
@given(top=st.integers(2, 5), count=st.integers(1, 4))
def test_features_are_as_wide_as_announced_and_zero_where_nothing_is_known(top: int, count: int) -> None:
    config = PolicyConfig.model_validate(RICH | {"top": top, "region": False})
    step = random_step(config, LENGTHS[:count], 0.6)
    found = features.read(step, config.features)
    assert found.shape == (*step.candidate.shape, config.numbers)
    assert found.isfinite().all()
    assert (found[~step.candidate] == 0).all() and (found[step.candidate] != 0).any(dim=-1).all()


def test_doubt_tells_apart_what_is_almost_sure() -> None:
    step = random_step(network(features=["doubt"]).config, LENGTHS[:1], 0.6)
    sure = step.confidence.clone().fill_(0.99), step.confidence.clone().fill_(0.9999)
    low, high = (features.read(replace(step, confidence=c), ("doubt",)).mean() for c in sure)
    assert high - low > 0.5


def seen(region: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Row], Step, list[torch.Tensor]]:
    """Rows of different lengths, the first step that a policy decides on for them, and their masks in it."""
    rule = sampler(region=region)
    rows = [
        Row(Canvas.blank([1 + i], 6 + 2 * i, MASK, (None, 4)[i % 2]), rule, rule.Params(), seed=i) for i in range(2)
    ]
    found: list[tuple[Step, list[torch.Tensor]]] = []
    select = rule.select

    def watched(step: Step) -> Selection:
        found.append((step, [row.canvas.masked.clone() for row in rows]))
        return select(step)

    monkeypatch.setattr(rule, "select", watched)
    finish(rows, predictor())
    return rows, *found[0]


def test_the_region_is_read_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, step, masked = seen(True, monkeypatch)
    for i, row in enumerate(rows):
        length, block = row.canvas.layout.gen_length, row.canvas.layout.block_size(0)
        assert (step.confidence[i, :length] > 0).all() and (step.confidence[i, length:] == -torch.inf).all()
        assert step.masked[i, :length].equal(masked[i])
        assert step.candidate[i].nonzero()[:, 0].tolist() == list(range(block))
    _, step, _ = seen(False, monkeypatch)
    assert (step.confidence > -torch.inf).equal(step.candidate)


def test_one_frequency_is_the_papers_quirk() -> None:
    found = waves(torch.tensor([0.3]), 1.0)
    assert torch.allclose(found[0, :64], torch.tensor(0.3).cos().expand(64))
    assert len(waves(torch.tensor([0.3]), 100.0)[0].unique()) > 100
