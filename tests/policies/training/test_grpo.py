"""Rewards and the policy gradient, by hand and by finite differences."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from policies.training.log_likelihoods import bernoulli_log_prob
from policies.training.policy_gradient import clipped_loss, expert_mixture, regularisation
from policies.training.rewards import DeviationScale, group_advantage, path_likelihood, reward

BUDGET = 16


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize(("forwards", "left"), [(1, 1.0), (8, 9 / 16), (16, 1 / 16), (40, 1 / 16)])
def test_multiplicative_rewards(alpha: float, forwards: int, left: float) -> None:
    found = reward(torch.tensor([1.0, 0.0]), torch.tensor([forwards] * 2), torch.tensor([BUDGET] * 2), alpha)
    assert found.tolist() == pytest.approx([left**alpha, 0.0])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 10.0])
@pytest.mark.parametrize(("forwards", "used"), [(1, 1 / 16), (8, 0.5), (16, 1.0), (40, 1.0)])
def test_additive_rewards(alpha: float, forwards: int, used: float) -> None:
    found = reward(
        torch.tensor([1.0, 0.0]), torch.tensor([forwards] * 2), torch.tensor([BUDGET] * 2), alpha, "additive"
    )
    assert found.tolist() == pytest.approx([1 - alpha * used, -alpha * used])


def test_an_all_wrong_group_says_nothing_only_in_the_multiplicative_form() -> None:
    wrong, forwards, budget = torch.zeros(4), torch.tensor([1, 4, 8, 16]), torch.full((4,), BUDGET)
    assert group_advantage(reward(wrong, forwards, budget, 1.0)[None]).eq(0).all()
    additive = group_advantage(reward(wrong, forwards, budget, 1.0, "additive")[None])[0]
    assert additive[0] > 0.3 and additive.argmax() == 0


def test_path_likelihood_is_the_mean_over_a_generations_tokens() -> None:
    committed = torch.tensor([[True, True, False], [False, True, False], [False, False, True]])
    confidence = torch.tensor([[0.5, 0.25, 0.9], [-torch.inf, 1.0, 0.9], [0.9, 0.9, 0.125]])
    found = path_likelihood(committed, confidence, torch.tensor([0, 1, 0]), 3)
    assert found.tolist() == pytest.approx([-2 * math.log(2), 0.0, 0.0])


def test_advantages_are_not_divided_by_the_deviation() -> None:
    found = group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.9, 0.9, 0.8, 1.0]]))
    assert found.flatten().tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5, 0.0, 0.0, -0.1, 0.1])


def test_each_alpha_has_its_own_running_scale() -> None:
    scale = DeviationScale(decay=0.5)
    advantage = torch.tensor([[2.0, -2.0], [0.1, -0.1], [2.0, -2.0]])
    first = scale.scale(advantage, torch.tensor([1.0, 10.0, 1.0]))
    assert first.abs().flatten().tolist() == pytest.approx([1.0] * 6)
    second = scale.scale(advantage * 2, torch.tensor([1.0, 10.0, 1.0]))
    assert second.abs().flatten().tolist() == pytest.approx([4 / 3] * 6)
    assert scale.scale(torch.zeros(1, 2), torch.tensor([3.0])).eq(0).all()


def numeric(function: object, at: Tensor) -> Tensor:
    """Central differences of a scalar function."""
    assert callable(function)
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        moved = torch.zeros_like(at)
        moved.view(-1)[i] = 1e-6
        out.view(-1)[i] = (function(at + moved) - function(at - moved)) / 2e-6
    return out


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("moved", [0.0, 0.9, -0.9])
@pytest.mark.parametrize("expert", [False, True])
def test_the_losss_gradient_is_that_of_finite_differences(advantage: float, moved: float, expert: bool) -> None:
    """On both sides of the clip, for own and for expert rows."""
    old = torch.tensor([-2.0, -3.0], dtype=torch.float64)
    flags, weight = torch.tensor([expert, False]), torch.tensor([0.25, 0.5], dtype=torch.float64)
    advantages = torch.tensor([advantage, advantage], dtype=torch.float64)

    def loss(new: Tensor) -> Tensor:
        before = expert_mixture(old, flags, 8, 1)
        return clipped_loss(expert_mixture(new, flags, 8, 1), before, advantages, weight, 0.3)

    new = (old + moved).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(new), new)
    assert torch.allclose(gradient, numeric(lambda x: loss(x), new.detach()), atol=1e-6)
    clipped = (moved > 0) == (advantage > 0) and moved != 0
    assert bool(gradient[1] == 0) == clipped


def test_at_ratio_one_it_is_reinforce_with_a_baseline() -> None:
    new = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantage, weight = torch.tensor([0.5, -0.2, 0.0]), torch.tensor([0.1, 0.2, 0.3])
    (gradient,) = torch.autograd.grad(clipped_loss(new, new.detach(), advantage, weight, 0.2), new)
    assert gradient.tolist() == pytest.approx((-advantage * weight).tolist())


def test_an_experts_ratio_is_bounded() -> None:
    flags = torch.tensor([True])
    low, high = (expert_mixture(torch.tensor([x]), flags, 8, 1) for x in (-200.0, 0.0))
    assert float(low) == pytest.approx(-math.log(9))
    assert float((high - low).exp()) == pytest.approx(9.0)
    assert float(expert_mixture(torch.tensor([-3.0]), ~flags, 8, 1)) == -3.0


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """All actions of one step over three positions, enumerated: mean of R * grad log pi = grad of mean R."""
    logits = torch.tensor([0.4, -0.3, 1.1], dtype=torch.float64, requires_grad=True)
    actions = torch.tensor(list(itertools.product([False, True], repeat=3)))
    candidates = torch.ones(8, 3, dtype=torch.bool)
    worth = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = bernoulli_log_prob(actions, logits.expand(8, -1), candidates)
    (expected,) = torch.autograd.grad((logs.exp() * worth).sum(), logits, retain_graph=True)
    advantage = worth - (logs.exp() * worth).sum().detach()
    loss = clipped_loss(logs, logs.detach(), advantage, logs.exp().detach(), 0.2)
    (found,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(-found, expected)


def test_regularisation_pulls_to_chance_and_to_the_reference() -> None:
    logits = torch.tensor([[2.0, -1.0]], requires_grad=True)
    everywhere, weight = torch.ones(1, 2, dtype=torch.bool), torch.ones(1)
    (entropy,) = torch.autograd.grad(regularisation(logits, None, everywhere, weight, 0.1, 0.0), logits)
    assert entropy[0, 0] > 0 > entropy[0, 1]
    reference = torch.tensor([[3.0, -3.0]])
    (kl,) = torch.autograd.grad(regularisation(logits, reference, everywhere, weight, 0.0, 0.1), logits)
    assert kl[0, 0] < 0 < kl[0, 1]
    assert regularisation(logits, logits.detach(), everywhere, weight, 0.0, 0.1).abs() < 1e-6
