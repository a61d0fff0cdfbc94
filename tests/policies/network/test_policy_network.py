"""The policy network and what it reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from samplers.loop.grid import Grid

from policies.network import features
from policies.network.config import PolicyConfig
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy, parameters, waves
from samplers import Canvas, Step
from samplers.loop.denoising import ask
from samplers.loop.row import Row
from tests.policies.tiny import RICH, network, sampler
from tests.samplers.models import MASK, VOCAB, predictor


def steps(count: int, **config: object) -> tuple[list[Row], Step]:
    """Rows of different lengths and ages that a policy of this configuration decides on, and their step."""
    rule = sampler(**config)
    rows = []
    for i in range(count):
        row = Row(Canvas.blank([1 + i], 6 + 2 * i, MASK, (None, 4)[i % 2]), rule, rule.Params(), seed=i)
        row.commit(torch.tensor([0, 2]), torch.tensor([3, 4]))
        row.forwards = 1 + i
        rows.append(row)
    query = ask(rows)
    return rows, Grid(rows, query.row, query.position, predictor()(query)).step(range(count))


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
    config = {**features, "region": region}
    rows, step = steps(8, **config)
    loaded = LoadedPolicy(network(**config))
    together = loaded.score(step, None)
    for i, row in enumerate(rows):
        query = ask([row])
        alone = loaded.score(Grid([row], query.row, query.position, predictor()(query)).step([0]), None)
        length = row.canvas.layout.gen_length
        assert alone.shape == (1, length)
        assert torch.allclose(together[i, :length], alone[0], atol=1e-5)
    assert together.shape[1] >= 2 * rows[0].canvas.layout.gen_length


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
    _, step = steps(count, **RICH | {"top": top, "region": False})
    found = features.read(step, config.features)
    assert found.shape == (*step.candidate.shape, config.numbers)
    assert found.isfinite().all()
    assert (found[~step.candidate] == 0).all() and (found[step.candidate] != 0).any(dim=-1).all()


def test_doubt_tells_apart_what_is_almost_sure() -> None:
    _, step = steps(1, features=["doubt"])
    sure = step.confidence.clone().fill_(0.99), step.confidence.clone().fill_(0.9999)
    low, high = (features.read(Step(**{**vars(step), "confidence": c}), ("doubt",)).mean() for c in sure)
    assert high - low > 0.5


def test_the_region_is_read_only_if_asked_for() -> None:
    rows, step = steps(2, region=True)
    for i, row in enumerate(rows):
        length = row.canvas.layout.gen_length
        assert (step.confidence[i, :length] > 0).all() and (step.confidence[i, length:] == -torch.inf).all()
        assert step.masked[i, :length].equal(row.canvas.masked)
        assert step.candidate[i].nonzero()[:, 0].tolist() == row.candidates().tolist()
    _, step = steps(2, region=False)
    assert (step.confidence > -torch.inf).equal(step.candidate)


def test_one_frequency_is_the_papers_quirk() -> None:
    found = waves(torch.tensor([0.3]), 1.0)
    assert torch.allclose(found[0, :64], torch.tensor(0.3).cos().expand(64))
    assert len(waves(torch.tensor([0.3]), 100.0)[0].unique()) > 100
