"""What travels to vLLM's workers and back, without vLLM: nothing is lost on the way, in whatever company."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from samplers import Canvas, Statistic, TokenChoice, get_sampler, list_samplers
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.statistics import LogitBonus, StatisticsRequest
from samplers.forward.summary import summarise
from samplers.forward.token_choice import TokenChoices
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.vllm.instructions import Instruction, answers, read, together
from tests.samplers.models import MASK, VOCAB

DRAWN = TokenChoice(0.8, 0.9, 5)


def wanted(
    count: int, statistics: Sequence[Statistic] = (), top: int = 0, named: int = 0, draws: bool = False, bonus: int = 0
) -> StatisticsRequest:
    generator = torch.Generator().manual_seed(count + top)
    choices = TokenChoices.of([DRAWN] * (count - 1) + [TokenChoice(top_k=2)]) if draws else None
    return StatisticsRequest(
        statistics=frozenset(statistics),
        only={name: torch.arange(count) % 2 == 0 for name in [*statistics[:1], *(["top"] if top else [])]},
        choices=choices,
        uniform=torch.rand(count, dtype=torch.float64, generator=generator) if draws else None,
        top=top,
        named=torch.randint(-1, VOCAB, (count, named), generator=generator) if named else None,
        bonus=LogitBonus(torch.arange(bonus), torch.arange(bonus) + 3, torch.full((bonus,), 2.5)) if bonus else None,
    )


CHOSEN = (Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN, Statistic.CHOSEN_CONFIDENCE)
COUNTS = (3, 4, 5, 2, 6, 4, 3)
WISHES = [
    wanted(3),
    wanted(4, [Statistic.ENTROPY, Statistic.MARGIN]),
    wanted(5, top=4),
    wanted(2, named=3),
    wanted(6, CHOSEN, draws=True),
    wanted(4, [Statistic.MARGIN], top=2, named=1, draws=True, bonus=3),
    wanted(3, bonus=2),
]


def logits_of(count: int, seed: int) -> Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def rows_that_count(values: Tensor, wish: StatisticsRequest, name: str) -> Tensor:
    only = wish.only.get(name)
    return values if only is None else values[only]


def compare(found: Prediction, expected: Prediction, wish: StatisticsRequest) -> None:
    assert found.token.equal(expected.token)
    assert found.confidence.equal(expected.confidence)
    assert found.extra.keys() == expected.extra.keys() == wish.statistics
    for name in wish.statistics:
        found_rows, expected_rows = (rows_that_count(each.extra[name], wish, name) for each in (found, expected))
        assert found_rows.equal(expected_rows) and bool(found_rows.isfinite().all())
    for name in ("top", "named"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert rows_that_count(one, wish, name).equal(rows_that_count(other, wish, name))


@pytest.mark.parametrize(("count", "wish"), list(zip(COUNTS, WISHES, strict=True)))
def test_an_instruction_survives_the_journey(count: int, wish: StatisticsRequest) -> None:
    instruction = Instruction(torch.arange(count) * 7, wish)
    packed = instruction.pack()
    _check_plain(packed)
    arrived = Instruction.unpack(packed)
    assert arrived.position.equal(instruction.position)
    assert arrived.columns == instruction.columns
    compare(summarise(logits_of(count, 1), MASK, arrived.wanted), summarise(logits_of(count, 1), MASK, wish), wish)


def _check_plain(value: object) -> None:
    """What msgpack takes, and no enumeration or tensor in disguise."""
    if isinstance(value, dict):
        for name, each in value.items():
            assert isinstance(name, str)
            _check_plain(each)
    elif isinstance(value, list):
        for each in value:
            _check_plain(each)
    else:
        assert isinstance(value, str | int | float | bytes)


@pytest.mark.parametrize("order", [range(len(WISHES)), reversed(range(len(WISHES)))])
def test_what_is_said_together_is_what_is_said_alone(order: Sequence[int]) -> None:
    members = list(order)
    asked = [Instruction(torch.arange(COUNTS[i]), WISHES[i]) for i in members]
    logits = torch.cat([logits_of(COUNTS[i], i) for i in members])
    said = answers(asked, summarise(logits, MASK, together(asked)))
    for i, answer in zip(members, said, strict=True):
        assert answer.dtype == torch.float32 and answer.shape == (COUNTS[i], WISHES[i].columns)
        compare(read(answer, WISHES[i]), summarise(logits_of(COUNTS[i], i), MASK, WISHES[i]), WISHES[i])


def test_every_sampler_gets_what_it_asked_for() -> None:
    """One query of all of them, taken apart by canvas and put together again."""
    rows = []
    for i, sampler in enumerate(each for each in list_samplers() if not each.requires and not each.drafts):
        choice = TokenChoice(0.0 if sampler.chooses_tokens else 0.7)
        rows.append(Row(Canvas.blank([5, 6 + i % 3], 6 + i % 4, MASK), sampler, sampler.Params(), choice, seed=i))
    query = next_query(rows)
    logits = logits_of(len(query.row), 3)
    parts = [query.part(i, i + 1) for i in range(len(rows))]
    asked = [Instruction.unpack(Instruction(part.position, part.wanted).pack()) for part in parts]
    said = answers(asked, summarise(logits, MASK, together(asked)))
    found = Prediction.join([read(answer, part.wanted) for answer, part in zip(said, parts, strict=True)])
    compare(found, summarise(logits, MASK, query.wanted), query.wanted)


def test_a_query_of_one_canvas_is_its_own_part() -> None:
    sampler = get_sampler("entropy")
    query: Query = next_query([Row(Canvas.blank([5], 4, MASK), sampler, sampler.Params())])
    packed = Instruction(query.position, query.wanted).pack()
    assert set(packed) == {"position", "statistics"}, "what nobody asked for must not travel"
    assert len(packed["position"]) == 4 * 4
