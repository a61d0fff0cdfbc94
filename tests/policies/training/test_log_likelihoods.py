"""Likelihoods of actions against enumeration, draws against likelihoods, gradients against finite differences."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policies.training.log_likelihoods import (
    bernoulli_draw,
    bernoulli_entropy,
    bernoulli_kl,
    bernoulli_log_prob,
    commit_at_least_one,
    dpls_draw,
    dpls_log_prob,
)

DRAWS = 100_000


def orders(candidates: Tensor) -> list[list[int]]:
    """Every ordered draw of these candidates, padded with STOP."""
    places, width = candidates.nonzero()[:, 0].tolist(), len(candidates)
    found = [list(o) for n in range(1, len(places) + 1) for o in itertools.permutations(places, n)]
    return [order + [-1] * (width - len(order)) for order in found] or [[-1] * width]


def subsets(candidates: Tensor) -> Tensor:
    """Every set of these candidates, [sets, width]."""
    bits = torch.tensor(list(itertools.product([False, True], repeat=len(candidates))))
    return bits[~(bits & ~candidates).any(dim=1)]


cases = [
    [True],
    [True, True],
    [True, False, True],
    [False, True, True, True],
    [True, True, True, True],
    [True, True, False, True, True, True],
    [False, False],
]


@pytest.mark.parametrize("mask", cases)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_bernoulli_likelihoods_sum_to_one(mask: list[bool], temperature: float) -> None:
    candidates = torch.tensor(mask)
    logits = torch.randn(len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    sets = subsets(candidates)
    p = bernoulli_log_prob(sets, logits.expand(len(sets), -1), candidates.expand(len(sets), -1), temperature).exp()
    assert p.sum() == pytest.approx(1.0, abs=1e-6)
    for action, likelihood in zip(sets, p, strict=True):
        s = torch.sigmoid(logits / temperature)
        expected = math.prod(float(s[i] if action[i] else 1 - s[i]) for i in range(len(mask)) if mask[i])
        assert float(likelihood) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("mask", cases)
@pytest.mark.parametrize("stop", [-1.0, 0.0, 0.7])
def test_dpls_likelihoods_sum_to_one(mask: list[bool], stop: float) -> None:
    candidates = torch.tensor(mask)
    logits = torch.randn(len(mask), generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2
    every = torch.tensor(orders(candidates))
    p = dpls_log_prob(every, logits.expand(len(every), -1), candidates.expand(len(every), -1), stop).exp()
    assert p.sum() == pytest.approx(1.0, abs=1e-6)
    for order, likelihood in zip(every.tolist(), p, strict=True):
        assert float(likelihood) == pytest.approx(one_by_one(order, logits, candidates, stop), abs=1e-9)


def one_by_one(order: list[int], logits: Tensor, candidates: Tensor, stop: float) -> float:
    """The same probability, draw by draw."""
    left = {i: math.exp(float(logits[i])) for i in candidates.nonzero()[:, 0].tolist()}
    total, first = 1.0, True
    if not left:
        return 1.0
    for place in [*order, -1]:
        all_left = sum(left.values()) + (0.0 if first else math.exp(stop))
        if place < 0:
            return total * math.exp(stop) / all_left
        total *= left.pop(place) / all_left
        first = False
    raise AssertionError("no end")


def within_four_sigma(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    assert set(counts) <= set(expected)
    for key, p in expected.items():
        assert abs(counts[key] / DRAWS - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS) + 1e-9


def test_bernoulli_draws_are_as_frequent_as_likely() -> None:
    candidates, logits = torch.tensor([True, True, False, True]), torch.tensor([0.3, -1.0, 2.0, 1.5])
    uniform = torch.rand(DRAWS, 4, generator=torch.Generator().manual_seed(3))
    drawn = bernoulli_draw(logits.expand(DRAWS, -1), candidates.expand(DRAWS, -1), uniform, temperature=0.7)
    sets = subsets(candidates)
    p = bernoulli_log_prob(sets, logits.expand(len(sets), -1), candidates.expand(len(sets), -1), 0.7).exp()
    expected = {tuple(map(int, s)): float(value) for s, value in zip(sets.tolist(), p, strict=True)}
    within_four_sigma(Counter(tuple(map(int, row)) for row in drawn.tolist()), expected)


def test_dpls_draws_are_as_frequent_as_likely() -> None:
    candidates, logits = torch.tensor([True, False, True, True]), torch.tensor([0.3, 2.0, -1.0, 1.5])
    uniform = torch.rand(DRAWS, 2, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    gumbel = -(-uniform.log()).log()
    order, action = dpls_draw(logits.expand(DRAWS, -1), candidates.expand(DRAWS, -1), gumbel, 0.4)
    every = torch.tensor(orders(candidates))
    p = dpls_log_prob(every, logits.expand(len(every), -1), candidates.expand(len(every), -1), 0.4).exp()
    expected = {tuple(o): float(value) for o, value in zip(every.tolist(), p, strict=True)}
    within_four_sigma(Counter(tuple(row) for row in order.tolist()), expected)
    sets = torch.zeros(DRAWS, 5, dtype=torch.bool).scatter(1, order.where(order >= 0, 4), True)[:, :4]
    assert sets.equal(action)


def test_scale_moves_probabilities_up_to_one() -> None:
    logits, uniform = torch.zeros(4), torch.tensor([0.2, 0.49, 0.51, 0.99])
    everywhere = torch.ones(4, dtype=torch.bool)
    assert bernoulli_draw(logits, everywhere, uniform, scale=1.0).tolist() == [True, True, False, False]
    assert bernoulli_draw(logits, everywhere, uniform, scale=0.5).tolist() == [True, False, False, False]
    assert bernoulli_draw(logits, everywhere, uniform, scale=3.0).all()


def test_an_empty_action_gets_its_likeliest_candidate_row_by_row() -> None:
    logits = torch.tensor([[0.1, 3.0, 0.2], [0.1, 3.0, 0.2], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    candidates = torch.tensor([[True, False, True], [True, True, True], [False, True, True], [False] * 3])
    action = torch.tensor([[False] * 3, [True, False, False], [False] * 3, [False] * 3])
    assert commit_at_least_one(action, logits, candidates).tolist() == [
        [False, False, True],
        [True, False, False],
        [False, True, False],
        [False] * 3,
    ]


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=6),
    size=st.sampled_from([0.0, 1.0, 80.0]),
    seed=st.integers(0, 1000),
)
def test_what_is_no_candidate_has_no_part(mask: list[bool], size: float, seed: int) -> None:
    """Never drawn, no gradient, nothing that is no number, and a row without candidates has likelihood one."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.tensor(mask)
    logits = (torch.randn(len(mask), generator=generator).sign() * size).requires_grad_()
    bits = bernoulli_draw(logits.detach(), candidates, torch.rand(len(mask), generator=generator))
    gumbel = -(-torch.rand(2, len(mask) + 1, generator=generator).clamp(min=1e-9).log()).log()
    order, action = dpls_draw(logits.detach(), candidates, gumbel)
    assert not (bits & ~candidates).any() and not (action & ~candidates).any()
    assert bool(action.any()) == bool(candidates.any())
    for value in (bernoulli_log_prob(bits, logits, candidates), dpls_log_prob(order, logits, candidates)):
        assert value.isfinite() and value <= 1e-6
        if not any(mask):
            assert value == 0
        (gradient,) = torch.autograd.grad(value, logits)
        assert gradient.isfinite().all() and (gradient[~candidates] == 0).all()


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    candidates = torch.rand(3, 5, generator=generator) < 0.7
    candidates[:, 0] = True
    bits = candidates & (torch.rand(3, 5, generator=generator) < 0.5)
    gumbel = -(-torch.rand(3, 2, 6, generator=generator, dtype=torch.float64).log()).log()
    order, _ = dpls_draw(logits.detach(), candidates, gumbel)
    assert torch.autograd.gradcheck(lambda b: bernoulli_log_prob(bits, b, candidates, 0.7), logits)
    assert torch.autograd.gradcheck(lambda b: dpls_log_prob(order, b, candidates, 0.3), logits)
    assert torch.autograd.gradcheck(lambda b: bernoulli_entropy(b, candidates), logits)
    assert torch.autograd.gradcheck(lambda b: bernoulli_kl(b, reference, candidates), logits)


@pytest.mark.parametrize("kind", ["bernoulli", "dpls"])
def test_the_mean_score_is_zero(kind: str) -> None:
    """Over all actions the gradient of the log-likelihood averages to nothing."""
    candidates = torch.tensor([True, True, False, True])
    logits = torch.tensor([0.3, -1.0, 2.0, 1.5], dtype=torch.float64, requires_grad=True)
    actions = subsets(candidates) if kind == "bernoulli" else torch.tensor(orders(candidates))
    rows = (logits.expand(len(actions), -1), candidates.expand(len(actions), -1))
    likelihood = bernoulli_log_prob if kind == "bernoulli" else dpls_log_prob
    logs = likelihood(actions, *rows)
    (gradient,) = torch.autograd.grad((logs.exp().detach() * logs).sum(), logits)
    assert torch.allclose(gradient, torch.zeros(4, dtype=torch.float64), atol=1e-9)


def test_entropy_and_divergence_by_enumeration() -> None:
    candidates = torch.tensor([True, False, True, True])
    logits = torch.tensor([0.3, 9.0, -1.0, 1.5], dtype=torch.float64)
    other = torch.tensor([-0.2, 3.0, 0.5, 1.0], dtype=torch.float64)
    sets = subsets(candidates)
    logs = bernoulli_log_prob(sets, logits.expand(len(sets), -1), candidates.expand(len(sets), -1))
    others = bernoulli_log_prob(sets, other.expand(len(sets), -1), candidates.expand(len(sets), -1))
    entropy, divergence = -(logs.exp() * logs).sum(), (logs.exp() * (logs - others)).sum()
    assert float(bernoulli_entropy(logits, candidates)) == pytest.approx(float(entropy))
    assert float(bernoulli_kl(logits, other, candidates)) == pytest.approx(float(divergence))
