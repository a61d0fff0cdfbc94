"""The policy sampler's knobs, on a network whose logits are written down."""

from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import Layout, ParameterError, SamplerError, Statistic, Step, get_sampler
from samplers.learned.policy import Action, Policy, PolicyParams
from tests.samplers.steps import step_of


class Written:
    """A policy network whose logits are given; with a speed they move by four times its distance from the middle."""

    statistics = frozenset[Statistic]()
    top = 0
    whole_region = False
    stop_logit = 0.0
    temperature = 1.0
    floor = 0.0
    longest = 64

    def __init__(self, logits: list[float], action: Action = "bernoulli", takes_speed: bool = False) -> None:
        self.logits = torch.tensor([logits])
        self.action: Action = action
        self.takes_speed = takes_speed

    def score(self, step: Step, speed: Tensor | None) -> Tensor:
        logits = self.logits.expand(len(step.params), -1)
        return logits if speed is None else logits + 8 * (speed - 0.5)


LOGITS = [3.0, 1.0, 0.0, -1.0, -9.0]


def step(params: list[PolicyParams], candidate: list[bool] | None = None) -> Step[PolicyParams]:
    rows, width = len(params), len(LOGITS)
    mask = torch.tensor([candidate or [True] * width]).expand(rows, -1)
    confidence = torch.tensor([[0.5, 0.9, 0.4, 0.3, 0.2]]).expand(rows, -1)
    return step_of(Policy(), params, confidence, mask, seed=torch.arange(rows)[:, None])


def commits(sampler: Policy, candidate: list[bool] | None = None, rows: int = 1, **params: Any) -> Tensor:
    return sampler.select(step([PolicyParams(**params)] * rows, candidate)).commit


def test_temperature_zero_commits_what_is_likelier_than_not() -> None:
    assert commits(Policy(Written(LOGITS)), temperature=0.0).tolist() == [[True, True, True, False, False]]


def test_a_cut_commits_what_reaches_it() -> None:
    policy = Policy(Written(LOGITS))
    assert commits(policy, cut=0.7).tolist() == [[True, True, False, False, False]]
    assert commits(policy, cut=0.2).tolist() == [[True, True, True, True, False]]
    assert commits(policy, cut=0.99).tolist() == [[True, False, False, False, False]], "the surest of the policy"


def test_the_fallback_is_the_policys_surest_candidate_not_the_models() -> None:
    candidate = [False, True, True, True, True]
    low = Policy(Written([9.0, -8.0, -7.0, -9.0, -9.0]))
    assert commits(low, candidate, cut=0.9).tolist() == [[False, False, True, False, False]]


def test_the_floor_keeps_back_what_the_model_is_unsure_of() -> None:
    assert commits(Policy(Written(LOGITS)), temperature=0.0, floor=0.45).tolist() == [[True, True, False, False, False]]
    assert commits(Policy(Written(LOGITS)), temperature=0.0, floor=1.0).sum() == 1


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.5), (1.0, 3.0)])
def test_draws_are_as_frequent_as_the_knobs_say(temperature: float, beta: float) -> None:
    """Each row draws from its own stream, with probability min(1, beta * sigmoid(logit / temperature))."""
    rows = 4000
    found = commits(Policy(Written(LOGITS)), rows=rows, temperature=temperature, beta=beta).double().mean(dim=0)
    p = (beta * torch.sigmoid(torch.tensor(LOGITS, dtype=torch.float64) / temperature)).clamp(max=1.0)
    p[0] += (1 - p).prod()  # an empty draw commits the first
    assert ((found - p).abs() <= 4 * (p * (1 - p) / rows).sqrt() + 1e-6).all()


def test_rows_have_their_own_knobs() -> None:
    policy = Policy(Written(LOGITS))
    params = [PolicyParams(cut=0.2), PolicyParams(temperature=0.0), PolicyParams(cut=0.99)]
    assert policy.select(step(params)).commit.sum(dim=1).tolist() == [4, 3, 1]


def test_speed_reaches_a_network_that_takes_it() -> None:
    policy = Policy(Written(LOGITS, takes_speed=True))
    counts = [int(commits(policy, temperature=0.0, speed=speed).sum()) for speed in (0.0, 0.5, 1.0)]
    assert counts == [1, 3, 4]
    assert commits(policy, temperature=0.0).sum() == 3, "without a speed the middle"


def test_dpls_at_temperature_zero_commits_what_beats_stop() -> None:
    policy = Policy(Written([0.5, 2.0, -0.1, -3.0, 1.0], action="dpls"))
    assert commits(policy, temperature=0.0).tolist() == [[True, True, False, False, True]]
    never = Policy(Written([-5.0, -4.0, -6.0, -7.0, -8.0], action="dpls"))
    assert commits(never, temperature=0.0).tolist() == [[False, True, False, False, False]]


@pytest.mark.parametrize(
    ("network", "params", "field"),
    [
        (None, {}, "policy"),
        (Written(LOGITS), {"speed": 0.3}, "speed"),
        (Written(LOGITS), {"cut": 0.3, "temperature": 1.0}, "cut"),
        (Written(LOGITS, action="dpls"), {"cut": 0.3}, "cut"),
        (Written(LOGITS, action="dpls"), {"beta": 2.0}, "beta"),
    ],
)
def test_parameters_that_do_not_fit_the_policy(network: Written | None, params: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as error:
        Policy(network).check(PolicyParams(**params), Layout(0, 4, 4))
    assert error.value.field == field


def test_without_a_network_nothing_is_decided() -> None:
    sampler = get_sampler("policy")
    with pytest.raises(SamplerError, match="no policy is loaded"):
        sampler.select(step([PolicyParams()]))


@pytest.mark.parametrize("action", ["bernoulli", "dpls"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_network_whose_output_is_not_finite_is_refused(action: str, poison: float) -> None:
    logits = [LOGITS[0], poison, *LOGITS[2:]]
    with pytest.raises(SamplerError, match="the policy's output is not finite"):
        Policy(Written(logits, action=action)).select(step([PolicyParams()]))
