"""Each rule on worked examples."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from samplers import Canvas, Layout, ParameterError, Sampler, Step, get_sampler
from samplers.base import best
from samplers.denoising import Denoising, Query, denoise
from samplers.prediction import Prediction
from tests.samplers.models import MASK, predictor


def one_step(
    confidence: list[float], candidate: list[bool] | None = None, block_masks: int | None = None, **params: object
) -> Step:
    """A first step of one row."""
    width = len(confidence)
    mask = torch.tensor([candidate or [True] * width])

    def counter(value: int) -> Tensor:
        return torch.tensor([[value]])

    sampler = get_sampler(str(params.pop("sampler")))
    return Step(
        candidate=mask,
        token=torch.ones(1, width, dtype=torch.int64),
        confidence=torch.tensor([confidence]).masked_fill(~mask, -torch.inf),
        extra={},
        params=[sampler.Params(**params)],
        layouts=[Layout(0, width, width)],
        seed=counter(0),
        forward=counter(0),
        block=counter(0),
        block_step=counter(0),
        block_masks=counter(block_masks or int(mask.sum())),
    )


def chosen(step: Step, sampler: str) -> list[int]:
    positions: list[int] = get_sampler(sampler).select(step).commit[0].nonzero()[:, 0].tolist()
    return positions


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.9, [0]), (0.74, [0, 2, 3]), (0.6, [0, 1, 2, 3]), (0.97, [0]), (0.98, [])]
)
def test_threshold_cuts(threshold: float, expected: list[int]) -> None:
    step = one_step([0.97, 0.60, 0.85, 0.74, 0.30], sampler="threshold", threshold=threshold)
    assert chosen(step, "threshold") == expected


def test_below_the_threshold_the_surest_is_committed_all_the_same() -> None:
    sampler = get_sampler("threshold")
    row = Denoising(Canvas.blank([1], 6, MASK), sampler, sampler.Params(threshold=1.0))
    denoise([row], predictor())
    assert row.forwards == 6


@pytest.mark.parametrize(("k", "expected"), [(1, [2]), (2, [2, 0]), (3, [2, 0, 4]), (9, [0, 1, 2, 3, 4])])
def test_topk_takes_the_surest(k: int, expected: list[int]) -> None:
    step = one_step([0.8, 0.1, 0.9, 0.2, 0.5], sampler="topk", k=k)
    assert chosen(step, "topk") == sorted(expected)


def test_topk_takes_one_where_nothing_else_is_said() -> None:
    assert chosen(one_step([0.1, 0.9], sampler="topk"), "topk") == [1]


def test_equal_confidences_go_to_the_lower_position() -> None:
    step = one_step([0.5, 0.7, 0.7, 0.5, 0.7], sampler="topk", k=2)
    assert chosen(step, "topk") == [1, 2]
    score = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    candidate = torch.tensor([[False, True, True, True]])
    assert best(score, candidate, torch.tensor([[2]])).tolist() == [[False, True, True, False]]
    wide = best(torch.zeros(1, 3000), torch.ones(1, 3000, dtype=torch.bool), torch.tensor([[1200]]))
    assert wide[0].nonzero()[:, 0].tolist() == list(range(1200))


def test_what_is_no_candidate_is_never_chosen_however_sure() -> None:
    step = one_step([0.9, 0.1, 0.2], candidate=[False, True, True], sampler="topk", k=1)
    assert chosen(step, "topk") == [2]
    step = one_step([0.99, 0.95, 0.2], candidate=[False, True, True], sampler="threshold", threshold=0.1)
    assert chosen(step, "threshold") == [1, 2]


@pytest.mark.parametrize(
    ("masks", "steps", "expected"),
    [
        (8, 3, [3, 3, 2]),
        (32, 5, [7, 7, 6, 6, 6]),
        (3, 8, [1, 1, 1]),
        (10, 10, [1] * 10),
        (5, 1, [5]),
    ],
)
@pytest.mark.parametrize("name", ["topk", "random"])
def test_steps_share_out_the_masks(name: str, masks: int, steps: int, expected: list[int]) -> None:
    """LLaDA's schedule; steps that would commit nothing are not taken."""
    assert commits(get_sampler(name), masks, masks, steps) == expected


def test_steps_are_shared_out_over_the_blocks() -> None:
    # 7 steps on three blocks of 4, 4 and 2: 3, 2 and 2 steps.
    assert commits(get_sampler("topk"), 10, 4, 7) == [2, 1, 1, 2, 2, 1, 1]


def commits(sampler: Sampler, gen_length: int, block_length: int, steps: int) -> list[int]:
    """How many each forward commits."""
    row = Denoising(Canvas.blank([1], gen_length, MASK, block_length), sampler, sampler.Params(steps=steps))
    left: list[int] = []

    def watched(query: Query) -> Prediction:
        left.append(int(row.canvas.masked.sum()))
        return predictor()(query)

    denoise([row], watched)
    left.append(0)
    return [a - b for a, b in pairwise(left)]


@pytest.mark.parametrize("name", ["topk", "random"])
def test_fewer_steps_than_blocks_are_refused(name: str) -> None:
    sampler = get_sampler(name)
    with pytest.raises(ParameterError, match="3 blocks need at least 3") as caught:
        Denoising(Canvas.blank([1], 12, MASK, 4), sampler, sampler.Params(steps=2))
    assert caught.value.field == "steps"


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("topk", {"k": 1, "steps": 2}),
        ("topk", {"k": 0}),
        ("topk", {"k": 1.5}),
        ("topk", {"k": True}),
        ("topk", {"threshold": 0.5}),
        ("random", {"steps": 0}),
        ("random", {"steps": "3"}),
        ("threshold", {"threshold": 0.0}),
        ("threshold", {"threshold": 1.01}),
        ("threshold", {"threshold": float("nan")}),
        ("threshold", {"threshold": None}),
    ],
)
def test_bad_parameters_are_refused(name: str, params: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        get_sampler(name).Params(**params)


def test_random_order_is_uniform_and_its_own_for_each_seed() -> None:
    """Over many seeds each position comes first equally often."""
    sampler, width, rows = get_sampler("random"), 8, 4000
    step = Step(
        candidate=torch.ones(rows, width, dtype=torch.bool),
        token=torch.ones(rows, width, dtype=torch.int64),
        confidence=torch.linspace(0, 1, width).expand(rows, width),
        extra={},
        params=[sampler.Params()] * rows,
        layouts=[Layout(0, width, width)] * rows,
        seed=torch.arange(rows)[:, None],
        **{name: torch.zeros(rows, 1, dtype=torch.int64) for name in ("forward", "block", "block_step")},
        block_masks=torch.full((rows, 1), width),
    )
    commit = sampler.select(step).commit
    assert commit.sum(dim=1).eq(1).all()
    share = commit.double().mean(dim=0)
    assert (share - 1 / width).abs().max() < 4 * (1 / width / rows) ** 0.5
