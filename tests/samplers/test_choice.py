"""Which token a position gets: the likeliest, or one drawn from exactly what temperature, top-k and top-p leave."""

import math

import pytest
import torch
from torch import Tensor

from samplers import Statistic, TokenChoice, TokenChoices
from samplers.forward.statistics import StatisticsRequest
from samplers.forward.summary import choosable, draw_tokens, summarise
from samplers.randomness import POSITIONS, TOKENS, uniform

LOGITS = [2.0, 0.5, 1.0, 1.9, -1.0, 0.0]


def exact(logits: list[float], choice: TokenChoice) -> list[float]:
    """Probabilities by the definition, in plain Python."""
    weights = {i: math.exp(value / choice.temperature) for i, value in enumerate(logits) if value > -math.inf}
    order = sorted(weights, key=lambda i: (-weights[i], i))
    if choice.top_k:
        order = order[: choice.top_k]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if reached >= choice.top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "choice",
    [
        TokenChoice(1.0),
        TokenChoice(0.3),
        TokenChoice(2.5),
        TokenChoice(1.0, top_p=0.9),
        TokenChoice(1.0, top_p=0.5),
        TokenChoice(1.0, top_p=1e-6),
        TokenChoice(1.0, top_k=1),
        TokenChoice(1.0, top_k=3),
        TokenChoice(1.0, top_k=100),
        TokenChoice(0.7, top_p=0.8, top_k=4),
        TokenChoice(0.01),
    ],
)
def test_draws_have_exactly_the_right_probabilities(choice: TokenChoice) -> None:
    """Equally spaced random numbers: each token's share is its probability, to within one draw at each of its ends."""
    count = 5000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    token = draw_tokens(
        *choosable(torch.tensor([LOGITS]).expand(count, -1), TokenChoices.of([choice] * count)), numbers
    )
    shares = torch.bincount(token, minlength=len(LOGITS)) / count
    expected = torch.tensor(exact(LOGITS, choice))
    assert (shares - expected).abs().max() <= 1.5 / count


def test_every_random_number_gives_a_possible_token() -> None:
    numbers = torch.tensor([0.0, 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    scores = torch.tensor([[-math.inf, 1.0, -math.inf, 0.5]]).expand(4, -1)
    token = draw_tokens(*choosable(scores, TokenChoices.of([TokenChoice(1.0)] * 4)), numbers)
    assert token.tolist() == [1, 1, 1, 3]
    # Probabilities that do not add up to one in binary: the last number must still find a token.
    flat = torch.zeros(1, 49)
    assert draw_tokens(*choosable(flat, TokenChoices.of([TokenChoice(1.0, top_p=0.999)])), numbers[3:]).item() == 48
    assert draw_tokens(*choosable(flat, TokenChoices.of([TokenChoice(1.0)])), numbers[3:]).item() == 48
    flat[0, 40:] = -math.inf
    assert (
        draw_tokens(*choosable(flat, TokenChoices.of([TokenChoice(1.0)])), torch.ones(1, dtype=torch.float64)).item()
        == 39
    )


def test_a_draw_depends_on_its_own_row_only() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, numbers = torch.randn(8, 20, generator=generator), torch.rand(8, generator=generator, dtype=torch.float64)
    choices = [TokenChoice(0.2 + 0.3 * i, top_p=1 - 0.1 * i, top_k=i) for i in range(8)]
    together = draw_tokens(*choosable(scores, TokenChoices.of(choices)), numbers)
    for i in range(8):
        assert (
            draw_tokens(*choosable(scores[i : i + 1], TokenChoices.of([choices[i]])), numbers[i : i + 1]) == together[i]
        )


def probabilities(*values: float) -> Tensor:
    return torch.tensor([values]).log()


def test_greedy_takes_the_likeliest_and_the_lower_of_equals() -> None:
    assert summarise(probabilities(0.1, 0.4, 0.4, 0.1), 0).token.item() == 1
    wide = torch.zeros(3, 70_001)
    wide[1, 69_000] = wide[1, 70_000] = 1.0
    assert summarise(wide, 0).token.tolist() == [1, 69_000, 1]


@pytest.mark.parametrize(
    "choice", [TokenChoice(), TokenChoice(1.0), TokenChoice(5.0, top_k=1), TokenChoice(1.0, top_p=0.1)]
)
def test_the_mask_token_is_never_chosen_but_keeps_its_probability(choice: TokenChoice) -> None:
    logits = probabilities(0.02, 0.9, 0.05, 0.03).expand(200, -1)
    numbers = torch.arange(200, dtype=torch.float64) / 200
    found = summarise(logits, 1, StatisticsRequest(choices=TokenChoices.of([choice] * 200), uniform=numbers))
    assert 1 not in found.token.tolist()
    expected = torch.tensor([0.02, 0.9, 0.05, 0.03])[found.token]
    assert torch.allclose(found.confidence, expected), "confidence is the model's own probability of the token"


def test_confidence_of_a_drawn_token_is_the_unmodified_probability() -> None:
    logits = torch.tensor([LOGITS]).expand(100, -1)
    numbers = torch.arange(100, dtype=torch.float64) / 100
    found = summarise(
        logits, 5, StatisticsRequest(choices=TokenChoices.of([TokenChoice(3.0, top_k=4)] * 100), uniform=numbers)
    )
    assert len(found.token.unique()) == 4
    assert torch.allclose(found.confidence, torch.tensor(LOGITS).softmax(0)[found.token])


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    logits = torch.tensor([LOGITS]).expand(3, -1)
    choices = [TokenChoice(), TokenChoice(1.0), TokenChoice()]
    found = summarise(
        logits,
        5,
        StatisticsRequest(
            choices=TokenChoices.of(choices), uniform=torch.tensor([0.99, 0.99, 0.99], dtype=torch.float64)
        ),
    )
    assert found.token.tolist() == [0, 4, 0]


def test_statistics() -> None:
    wanted = frozenset({Statistic.ENTROPY, Statistic.MARGIN})
    found = summarise(
        torch.cat([probabilities(0.5, 0.3, 0.2), probabilities(1.0, 0.0, 0.0)]), 2, StatisticsRequest(wanted)
    )
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert found.extra[Statistic.ENTROPY].tolist() == pytest.approx([entropy, 0.0], abs=1e-6)
    assert found.extra[Statistic.MARGIN].tolist() == pytest.approx([0.2, 1.0], abs=1e-6)
    assert summarise(probabilities(0.5, 0.3, 0.2), 2).extra == {}


def test_half_precision_logits_are_computed_on_in_float32() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    half, full = (summarise(values, 0) for values in (logits, logits.float()))
    assert half.confidence.dtype == torch.float32
    assert half.confidence.equal(full.confidence) and half.token.equal(full.token)


def grid(seeds: int, steps: int, positions: int, stream: int, first_seed: int = 0) -> Tensor:
    return uniform(
        torch.arange(first_seed, first_seed + seeds)[:, None, None],
        torch.arange(steps)[None, :, None],
        torch.arange(positions)[None, None, :],
        stream,
    )


@pytest.mark.parametrize("stream", [TOKENS, POSITIONS])
@pytest.mark.parametrize("first_seed", [0, 123456789, 2**62])
def test_random_numbers_are_uniform(stream: int, first_seed: int) -> None:
    numbers = grid(40, 40, 40, stream, first_seed)
    assert numbers.dtype == torch.float64
    assert numbers.min() >= 0 and numbers.max() < 1
    count = numbers.numel()
    expected = count / 64
    observed = torch.bincount((numbers.flatten() * 64).long(), minlength=64).double()
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 63 + 4 * math.sqrt(2 * 63)
    assert abs(numbers.mean().item() - 0.5) < 4 / math.sqrt(12 * count)


def test_neighbouring_random_numbers_have_nothing_in_common() -> None:
    numbers = grid(40, 40, 40, TOKENS) - 0.5
    limit = 4 / math.sqrt(numbers.numel())
    for axis in range(3):
        product = (numbers * numbers.roll(1, dims=axis)).mean().item() * 12
        assert abs(product) < limit
    assert numbers.unique().numel() == numbers.numel()


def test_streams_of_one_seed_and_of_neighbouring_seeds_share_no_number() -> None:
    tokens, positions = grid(8, 8, 8, TOKENS), grid(8, 8, 8, POSITIONS)
    assert torch.cat([tokens.flatten(), positions.flatten()]).unique().numel() == 2 * tokens.numel()


def test_a_random_number_depends_on_seed_step_and_position_only() -> None:
    numbers = grid(3, 4, 5, TOKENS)
    for seed in range(3):
        alone = uniform(torch.tensor(seed), torch.tensor(2), torch.tensor([4, 1]), TOKENS)
        assert alone.tolist() == [numbers[seed, 2, 4].item(), numbers[seed, 2, 1].item()]


def test_statistics_of_what_tokens_are_drawn_from() -> None:
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(3)) * 2
    choices = [
        TokenChoice(),
        TokenChoice(0.5),
        TokenChoice(1.0, top_k=3),
        TokenChoice(0.0, top_p=0.6),
        TokenChoice(1.5, 0.8, 6),
    ]
    found = summarise(
        logits,
        0,
        StatisticsRequest(
            frozenset(Statistic), choices=TokenChoices.of(choices), uniform=torch.full((5,), 0.4, dtype=torch.float64)
        ),
    )
    for i, choice in enumerate(choices):
        p = (logits[i] / (choice.temperature or 1.0)).double()
        if choice != TokenChoice():
            p[0] = -torch.inf
        p = p.softmax(dim=-1)
        if choice.top_k:
            p[p < p.sort(descending=True).values[choice.top_k - 1]] = 0
        p = p / p.sum()
        ranked, order = p.sort(descending=True)
        p[order[ranked.cumsum(0) - ranked >= choice.top_p]] = 0
        p = p / p.sum()
        assert p[found.token[i]] > 0
        assert found.extra[Statistic.CHOSEN_CONFIDENCE][i].item() == pytest.approx(p[found.token[i]].item(), abs=1e-6)
        two = p.topk(2).values
        assert found.extra[Statistic.CHOSEN_MARGIN][i].item() == pytest.approx((two[0] - two[1]).item(), abs=1e-6)
        entropy = -(p * p.clamp(min=1e-300).log()).sum().item()
        assert found.extra[Statistic.CHOSEN_ENTROPY][i].item() == pytest.approx(entropy, abs=1e-5)
