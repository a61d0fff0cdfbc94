"""Each rule on worked examples."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from samplers import Canvas, ParameterError, Sampler, Step, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.statistics import CHOSEN, Statistic
from samplers.loop.row import Row
from samplers.loop.run import finish, run
from samplers.ranking import best, surest
from tests.samplers.models import MASK, events_of, predictor, turn
from tests.samplers.steps import step_of


def one_step(
    confidence: list[float], candidate: list[bool] | None = None, block_masks: int | None = None, **params: object
) -> Step:
    """A first step of one row."""
    sampler = get_sampler(str(params.pop("sampler")))
    mask = torch.tensor([candidate or [True] * len(confidence)])
    own = sampler.Params(**params)
    return step_of(sampler, [own], torch.tensor([confidence]), mask, block_masks=block_masks)


def chosen(step: Step, sampler: str) -> list[int]:
    """What is committed: the surest candidate where the rule commits none."""
    commit = get_sampler(sampler).select(step).commit
    commit = commit if bool(commit.any()) else surest(step.confidence, step.candidate)
    positions: list[int] = commit[0].nonzero()[:, 0].tolist()
    return positions


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.9, [0]), (0.74, [0, 2, 3]), (0.6, [0, 1, 2, 3]), (0.97, [0]), (0.98, [0])]
)
def test_threshold_cuts(threshold: float, expected: list[int]) -> None:
    step = one_step([0.97, 0.60, 0.85, 0.74, 0.30], sampler="threshold", threshold=threshold)
    assert chosen(step, "threshold") == expected


def test_below_the_threshold_the_surest_is_committed_all_the_same() -> None:
    sampler = get_sampler("threshold")
    row = Row(Canvas.blank([1], 6, MASK), sampler, sampler.Params(threshold=1.0))
    finish([row], predictor())
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
    row = Row(Canvas.blank([1], gen_length, MASK, block_length), sampler, sampler.Params(steps=steps))
    left: list[int] = []

    def watched(query: Query) -> Prediction:
        left.append(int(row.canvas.masked.sum()))
        return predictor()(query)

    finish([row], watched)
    left.append(0)
    return [a - b for a, b in pairwise(left)]


@pytest.mark.parametrize("name", ["topk", "random"])
def test_fewer_steps_than_blocks_are_refused(name: str) -> None:
    sampler = get_sampler(name)
    with pytest.raises(ParameterError, match="3 blocks need at least 3") as caught:
        Row(Canvas.blank([1], 12, MASK, 4), sampler, sampler.Params(steps=2))
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
    confidence = torch.linspace(0, 1, width).expand(rows, width)
    step = step_of(sampler, [sampler.Params()] * rows, confidence, seed=torch.arange(rows)[:, None])
    commit = sampler.select(step).commit
    assert commit.sum(dim=1).eq(1).all()
    share = commit.double().mean(dim=0)
    assert (share - 1 / width).abs().max() < 4 * (1 / width / rows) ** 0.5


def by_probabilities(rows: list[list[float]], candidate: list[bool] | None = None, **params: object) -> Step:
    """A first step whose statistics are those of these distributions."""
    p = torch.tensor([row + [0.0] * (5 - len(row)) for row in rows])
    two = p.topk(2, dim=1).values
    made = one_step(two[:, 0].tolist(), candidate, **params)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(dim=1)
    return replace(made, extra={Statistic.ENTROPY: entropy[None], Statistic.MARGIN: (two[:, 0] - two[:, 1])[None]})


@pytest.mark.parametrize(
    ("confidence", "factor", "expected"),
    [
        ([0.99, 0.97, 0.90, 0.60, 0.50], 1.0, [0, 1, 2]),
        ([0.99, 0.97, 0.90, 0.60, 0.50], 0.5, [0, 1, 2]),
        ([0.99, 0.97, 0.90, 0.60, 0.50], 0.3, [0, 1]),
        ([0.97, 0.90, 0.10], 1.0, [0, 1]),  # the released loop commits all three
        ([0.10, 0.20, 0.15], 1.0, [1]),
        ([0.5, 0.99, 0.5, 0.99], 0.001, [1]),
        ([1.0, 1.0, 1.0], 0.001, [0, 1, 2]),
    ],
)
def test_factor(confidence: list[float], factor: float, expected: list[int]) -> None:
    assert chosen(one_step(confidence, sampler="factor", factor=factor), "factor") == expected


EB = [[0.97, 0.02, 0.01], [0.90, 0.05, 0.05], [0.70, 0.20, 0.10], [0.5, 0.3, 0.2], [0.4, 0.35, 0.25]]


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(0.0, [0]), (0.1, [0]), (0.5, [0, 1]), (1.0, [0, 1, 2]), (1.4, [0, 1, 2, 3]), (9.0, [0, 1, 2, 3, 4])],
)
def test_entropy_bound(gamma: float, expected: list[int]) -> None:
    assert chosen(by_probabilities(EB, sampler="entropy_bound", gamma=gamma), "entropy_bound") == expected
    backwards = chosen(by_probabilities(EB[::-1], sampler="entropy_bound", gamma=gamma), "entropy_bound")
    assert sorted(4 - place for place in backwards) == expected


def test_entropy_bound_without_entropy_commits_all_that_is_certain() -> None:
    rows = [[1.0], [0.5, 0.5], [1.0], [0.6, 0.4]]
    assert chosen(by_probabilities(rows, sampler="entropy_bound", gamma=0.0), "entropy_bound") == [0, 2, 3]


def test_entropy_bound_subtracts_the_largest_entropy_not_the_last() -> None:
    """Sorted by confidence the largest entropy can stand first."""
    rows = [[0.51, 0.13, 0.12, 0.12, 0.12], [0.505, 0.495], [0.5, 0.5]]
    first = by_probabilities(rows, sampler="entropy_bound", gamma=0.7, proxy="confidence")
    assert chosen(first, "entropy_bound") == [0, 1]
    assert chosen(by_probabilities(rows, sampler="entropy_bound", gamma=0.7), "entropy_bound") == [1, 2]


def test_scores_choose_differently() -> None:
    """The example of Dream's rules, one commit each."""
    rows = [[0.50, 0.48, 0.01, 0.01], [0.46, 0.18, 0.18, 0.18], [0.49, 0.30, 0.21]]
    assert chosen(by_probabilities(rows, sampler="topk"), "topk") == [0]
    assert chosen(by_probabilities(rows, sampler="margin"), "margin") == [1]
    assert chosen(by_probabilities(rows, sampler="entropy_bound", gamma=0.0), "entropy_bound") == [0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [({"k": 2}, [0, 1]), ({"threshold": 0.4}, [0, 1, 2]), ({"threshold": 0.96}, [0]), ({"steps": 1}, [0, 1, 2, 3, 4])],
)
def test_margin(params: dict[str, object], expected: list[int]) -> None:
    assert chosen(by_probabilities(EB, sampler="margin", **params), "margin") == expected


def test_margin_commits_the_clearest_where_nothing_reaches_the_threshold() -> None:
    rows = [[0.50, 0.48], [0.46, 0.18, 0.18, 0.18]]
    assert chosen(by_probabilities(rows, sampler="margin", threshold=0.9), "margin") == [1]


def test_samplers_leave_alone_what_is_no_candidate() -> None:
    candidate = [False, True, False, True, True]
    for sampler, params in (("factor", {}), ("entropy_bound", {"gamma": 9.0}), ("margin", {"k": 5})):
        found = chosen(by_probabilities(EB, candidate, sampler=sampler, **params), sampler)
        assert set(found) <= {1, 3, 4} and found


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"threshold": 0.9, "k": 3}, [0, 2, 3]),
        ({"threshold": 0.6, "k": 3}, [0, 1, 2, 3]),
        ({"threshold": 0.9, "steps": 2}, [0, 2, 3]),
    ],
)
def test_a_threshold_and_at_least_so_many(params: dict[str, object], expected: list[int]) -> None:
    assert chosen(one_step([0.97, 0.60, 0.85, 0.74, 0.30], sampler="threshold", **params), "threshold") == expected


def test_sequential_goes_from_left_to_right() -> None:
    step = one_step([0.1, 0.9, 0.8, 0.7], candidate=[False, True, True, True], sampler="sequential", k=2)
    assert chosen(step, "sequential") == [1, 2]
    assert commits(get_sampler("sequential"), 8, 8, 3) == [3, 3, 2]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [1, 6, 7]),
        ({"threshold": None}, [1, 6]),
        ({"low_threshold": None}, [1, 3, 6, 7]),
        ({"low_threshold": 0.7}, [6, 7]),
    ],
)
def test_hierarchy_fills_every_gap(params: dict[str, object], expected: list[int]) -> None:
    confidence = [0.5, 0.6, 0.0, 0.3, 0.2, 0.0, 0.95, 0.92]
    there = [True, True, False, True, True, False, True, True]
    assert chosen(one_step(confidence, there, sampler="hierarchy", **params), "hierarchy") == expected


def test_of_equals_in_a_gap_the_first_leads() -> None:
    step = one_step([0.5, 0.5, 0.5, 0.5], [True, True, False, True], sampler="hierarchy")
    assert chosen(step, "hierarchy") == [0, 3]


@pytest.mark.parametrize(("own", "expected"), [(False, [1, 2, 3]), (True, [1, 3])])
def test_whose_entropy_counts(own: bool, expected: list[int]) -> None:
    step = one_step([0.9, 0.99, 0.97, 0.98, 0.6], sampler="entropy_bound", gamma=0.1, own=own)
    entropy = torch.tensor([[0.30, 0.02, 0.06, 0.05, 0.90]])
    step = replace(step, extra={Statistic.ENTROPY: entropy, Statistic.MARGIN: entropy})
    assert chosen(step, "entropy_bound") == expected


THREE = [[0.50, 0.48, 0.01, 0.01], [0.46, 0.18, 0.18, 0.18], [0.49, 0.30, 0.21]]


def test_entropy_takes_the_least_uncertain() -> None:
    assert chosen(by_probabilities(THREE, sampler="entropy"), "entropy") == [0]
    assert chosen(by_probabilities(THREE, sampler="entropy", k=2), "entropy") == [0, 2]
    assert chosen(by_probabilities(THREE, sampler="entropy", threshold=1.1), "entropy") == [0, 2]
    assert chosen(by_probabilities(THREE, sampler="entropy", threshold=0.1), "entropy") == [0]


@pytest.mark.parametrize(
    ("alg", "expected"), [("maskgit_plus", [0]), ("topk_margin", [1]), ("entropy", [0]), ("origin", None)]
)
def test_dream_ranks_by_what_it_is_told(alg: str, expected: list[int] | None) -> None:
    step = by_probabilities(THREE, sampler="dream", alg=alg)
    chosen_of = {
        Statistic.CHOSEN_CONFIDENCE: step.confidence,
        Statistic.CHOSEN_MARGIN: step.extra[Statistic.MARGIN],
        Statistic.CHOSEN_ENTROPY: step.extra[Statistic.ENTROPY],
    }
    found = chosen(replace(step, extra=chosen_of), "dream")
    assert found == expected if expected else len(found) <= 3


@pytest.mark.parametrize(("masks", "steps", "expected"), [(8, 4, [1, 2, 2, 3]), (16, 16, [1] * 16), (8, 1, [8])])
def test_dreams_schedule(masks: int, steps: int, expected: list[int]) -> None:
    """The time that is left at the end makes the first shares round down; where one rounds to nothing, one goes."""
    row = Row(
        Canvas.blank([1], masks, MASK), get_sampler("dream"), get_sampler("dream").Params(steps=steps, alg="entropy")
    )
    left = [masks]
    for _ in run([row], predictor()):
        left.append(int(row.canvas.masked.sum()))
    assert [a - b for a, b in pairwise(left)] == expected


def test_dreams_random_shares_are_as_large_as_the_time_says() -> None:
    sizes = []
    for seed in range(300):
        row = Row(
            Canvas.blank([1], 32, MASK),
            get_sampler("dream"),
            get_sampler("dream").Params(steps=4, alg="origin", eps=1e-6),
            seed=seed,
        )
        (event,) = turn([row], predictor())
        sizes.append(len(event.positions))
    assert abs(sum(sizes) / len(sizes) - 8) < 0.6


def test_dream_draws_positions_in_proportion() -> None:
    """alg_temp 1: softmax of the scores."""
    first = [0, 0]
    for seed in range(400):
        step = one_step([0.9, 0.1], sampler="dream", alg="maskgit_plus", alg_temp=0.4, steps=2)
        step = replace(step, seed=torch.tensor([[seed]]), extra=dict.fromkeys(CHOSEN, step.confidence))
        (only,) = chosen(step, "dream")
        first[only] += 1
    expected = torch.tensor([0.9, 0.1]).div(0.4).softmax(0)[0].item()
    assert abs(first[0] / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0]),
        ({"threshold": 0.5}, [0, 1]),
        ({"k": 3}, [0, 1, 3]),
        ({"threshold": 1.0, "k": 2}, [0, 1]),
        ({"k": 9}, [*range(5)]),
    ],
)
def test_edit_commits_at_least_so_many(params: dict[str, float], expected: list[int]) -> None:
    """LLaDA2.1's `num_to_transfer`: the surest, where fewer pass the threshold; never more than there are."""
    step = one_step([0.97, 0.60, 0.20, 0.40, 0.30], sampler="edit", **params)
    assert chosen(step, "edit") == expected


LEAP = {0: 0.95, 3: 0.78, 5: 0.80, 8: 0.60, 9: 0.76}


@pytest.mark.parametrize(
    ("found", "params", "expected"),
    [
        (LEAP, {}, [0, 3]),  # 5 is too far, and below 0.9
        (LEAP, {"radius": 5}, [0, 3, 5]),
        (LEAP, {"radius": 0}, [0]),
        (LEAP, {"relaxed_threshold": 0.79}, [0]),
        (LEAP, {"threshold": 0.8}, [0, 3, 5, 9]),
        ({0: 0.85, 1: 0.80}, {}, [0]),
        ({2: 0.80, 3: 0.95, 4: 0.74}, {}, [2, 3]),
    ],
)
def test_local_leap_relaxes_near_anchors(
    found: dict[int, float], params: dict[str, object], expected: list[int]
) -> None:
    there = [position in found for position in range(10)]
    confidence = [found.get(position, 0.99) for position in range(10)]
    assert chosen(one_step(confidence, there, sampler="local_leap", **params), "local_leap") == expected


NAN = float("nan")


def saber_step(**more: Any) -> Step[Any]:
    """Committed 0: .50 (.90 a step ago) and 1: .75 (.70); candidates 2: .95, 3: .85, 4: .60; stored .9 and .7."""
    sampler = get_sampler("saber")
    state = {
        "committed": torch.tensor([[0.9, 0.7, NAN, NAN, NAN]]),
        "before": torch.tensor([[0.90, 0.70, 0.60, 0.80, 0.60]]),
        "sum": torch.tensor([[1.6]], dtype=torch.float64),
        "count": torch.tensor([[2]]),
    } | more.pop("state", {})
    candidate = torch.tensor([[False, False, True, True, True]])
    return step_of(
        sampler,
        [sampler.Params(**({"n": 2} | more))],
        torch.tensor([[0.50, 0.75, 0.95, 0.85, 0.60]]),
        candidate,
        committed=~candidate,
        state=state,
    )


def test_saber_commits_above_the_mean_and_masks_what_lost_most() -> None:
    """Mean .8: commit 2 and 3, and mask 0 again, which lost .40."""
    found = get_sampler("saber").select(saber_step())
    assert found.commit[0].nonzero()[:, 0].tolist() == [2, 3]
    assert found.remask is not None and found.remask[0].nonzero()[:, 0].tolist() == [0]
    assert found.state is not None
    assert found.state["sum"].item() == pytest.approx(1.6 + 0.95 + 0.85)
    assert found.state["count"].item() == 4
    assert found.state["before"][0].tolist() == pytest.approx([0.50, 0.75, 0.95, 0.85, 0.60])


@pytest.mark.parametrize(
    ("n", "commit", "remask"),
    [(1, [2, 3], [0]), (3, [2, 3, 4], []), (9, [2, 3, 4], [])],
)
def test_saber_masks_nothing_once_all_are_committed(n: int, commit: list[int], remask: list[int]) -> None:
    found = get_sampler("saber").select(saber_step(n=n))
    assert found.commit[0].nonzero()[:, 0].tolist() == commit
    assert found.remask is not None and found.remask[0].nonzero()[:, 0].tolist() == remask


def test_saber_at_first_commits_its_least_number() -> None:
    """Nothing is stored: nobody is above a mean of 1; of two commits one may be masked again, but nothing lost any."""
    sampler = get_sampler("saber")
    found = sampler.select(step_of(sampler, [sampler.Params()], torch.tensor([[0.3, 0.9, 0.8, 0.2]])))
    assert found.commit[0].nonzero()[:, 0].tolist() == [1, 2]
    assert found.remask is not None and not found.remask.any()


def test_saber_commits_more_than_it_masks() -> None:
    """Net progress of at least one a step, in any block."""
    sampler = get_sampler("saber")
    for seed in range(6):
        row = Row(Canvas.blank([seed], 24, MASK, 12), sampler, sampler.Params(n=3))
        for event in events_of([row], predictor())[0]:
            assert len(event.positions) > len(event.remasked)
        assert row.finished


def test_saber_counts_each_position_once() -> None:
    """One that was masked again and is committed anew replaces what was stored of it."""
    state = {
        "committed": torch.tensor([[0.9, 0.7, 0.6, NAN, NAN]]),
        "sum": torch.tensor([[2.2]], dtype=torch.float64),
        "count": torch.tensor([[3]]),
    }
    found = get_sampler("saber").select(saber_step(state=state))
    assert found.state is not None
    assert found.state["sum"].item() == pytest.approx(2.2 - 0.6 + 0.95 + 0.85)
    assert found.state["count"].item() == 4
