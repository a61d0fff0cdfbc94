"""Several canvases of one generation: smc's worked examples, and what holds for any rule that asks for them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    CacheMode,
    Canvas,
    ParameterError,
    Resampling,
    Sampler,
    SamplerError,
    SamplerParams,
    Selection,
    Slots,
    StateSpec,
    Step,
    TokenChoice,
    get_sampler,
)
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.event import StepEvent
from samplers.loop.numbers import N
from samplers.loop.row import Row
from samplers.loop.run import finish, run
from samplers.particles.smc import TOTAL, WEIGHT, SMCParams, systematic
from samplers.randomness import slot_seed
from samplers.ranking import surest
from samplers.resources import bound
from tests.samplers.models import MASK, VOCAB, events_of, predictor, random_logits

WARM = TokenChoice(0.9)


def smc(base: str = "threshold", params: dict[str, Any] | None = None, **own: Any) -> tuple[Sampler, SamplerParams]:
    found = SMCParams(base=base, base_params=params or {}, **own)
    return bound(get_sampler("smc"), found), found


def row(rule: tuple[Sampler, SamplerParams], **options: Any) -> Row:
    canvas = Canvas.blank(
        options.pop("prompt", [1, 2, 3]),
        options.pop("gen", 12),
        MASK,
        options.pop("block", 4),
        pattern=options.pop("pattern", BIDIRECTIONAL),
    )
    options = {"choice": WARM, "seed": 5, "vocabulary": VOCAB} | options
    return Row(canvas, *rule, **options)


def alone(base: str, params: dict[str, Any] | None = None, **options: Any) -> Row:
    sampler = get_sampler(base)
    return row((sampler, sampler.Params(**(params or {}))), **options)


def slots(weights: list[float], uniform: float = 0.1, ess: float = 0.5) -> Slots[SMCParams]:
    log = torch.tensor(weights, dtype=torch.float64).log()[:, None]
    params = SMCParams(particles=len(weights), ess=ess)
    return Slots(params, {WEIGHT: log, TOTAL: log}, uniform, torch.zeros(len(weights), dtype=torch.bool))


def test_texts_are_kept_while_enough_of_them_count() -> None:
    """w = .381, .159, .429, .032: 2.82 effective texts of 4, at least half."""
    sampler, _ = smc()
    products = [0.9 * 0.8, 0.6 * 0.5, 0.9 * 0.9, 0.3 * 0.2]
    weight = torch.tensor(products) / sum(products)
    assert weight.tolist() == pytest.approx([0.381, 0.159, 0.429, 0.032], abs=5e-4)
    assert 1 / (weight**2).sum().item() == pytest.approx(2.82, abs=5e-3)
    assert sampler.resample(slots(products)) is None
    assert sampler.resample(slots(products, ess=0.71)) is not None
    assert sampler.winner(slots(products)) == 2


def test_texts_are_drawn_anew_where_one_outweighs_the_others() -> None:
    """w = .909, .059, .024, .008: 1.20 effective texts of 4."""
    sampler, _ = smc()
    powers = [0.99**4, 0.5**4, 0.4**4, 0.3**4]
    weight = torch.tensor(powers, dtype=torch.float64) / sum(powers)
    assert weight.tolist() == pytest.approx([0.909, 0.059, 0.024, 0.008], abs=1e-3)
    assert 1 / (weight**2).sum().item() == pytest.approx(1.20, abs=5e-3)
    found = sampler.resample(slots(powers))
    assert found is not None and found.ancestors.tolist() == [0, 0, 0, 0]
    assert found.state[WEIGHT].tolist() == [[0.0]] * 4 and TOTAL not in found.state


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.1, [0, 0, 0, 0]), (0.9, [0, 0, 0, 2]), (0.6, [0, 0, 0, 0]), (0.999999, [0, 0, 0, 3])],
)
def test_systematic_resampling(uniform: float, expected: list[int]) -> None:
    weight = torch.tensor([0.909, 0.059, 0.024, 0.008], dtype=torch.float64)
    at = [(uniform + i) / 4 for i in range(4)]
    by_hand = [next(j for j in range(4) if weight[: j + 1].sum() >= each) for each in at]
    assert systematic(weight, uniform).tolist() == by_hand == expected


def test_each_text_is_drawn_as_often_as_its_weight_says() -> None:
    weight = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    counts = torch.zeros(4, dtype=torch.float64)
    for i in range(1000):
        drawn = torch.bincount(systematic(weight, (i + 0.5) / 1000), minlength=4)
        assert ((drawn - 4 * weight).abs() < 1).all()
        counts += drawn
    torch.testing.assert_close(counts / 4000, weight, atol=1e-3, rtol=0)


BASES: list[tuple[str, dict[str, Any]]] = [
    ("threshold", {"threshold": 0.5}),
    ("topk", {"k": 2}),
    ("topk", {"steps": 7}),
    ("random", {}),
    ("entropy_bound", {"gamma": 1.0}),
    ("margin", {"threshold": 0.3}),
    ("dream", {"alg": "origin", "steps": 8}),
    ("hierarchy", {}),
    ("local_leap", {"threshold": 0.6}),
    ("credit", {}),
]
PATTERNS = [
    BIDIRECTIONAL,
    AttentionPattern(causal_block=4),
    AttentionPattern(shifted=True),
    AttentionPattern(causal_block=4, shifted=True, judges_drawn=True, strict=True),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("base", "params"), BASES, ids=str)
def test_one_text_is_the_base_samplers(base: str, params: dict[str, Any], pattern: AttentionPattern) -> None:
    greedy = get_sampler(base).chooses_tokens
    for cache in CacheMode:
        warm = [WARM] if cache is not CacheMode.NONE else [TokenChoice(), WARM, TokenChoice(1.2, top_p=0.8)]
        for choice in [TokenChoice()] if greedy else warm:
            options: dict[str, Any] = {
                "cache": cache,
                "choice": choice,
                "pattern": pattern,
                "end_ids": frozenset({7}),
                "gen": 9,
            }
            rows = [row(smc(base, params, particles=1), **options), alone(base, params, **options)]
            asked: list[list[Any]] = [[], []]
            for each, note in zip(rows, asked, strict=True):

                def predict(query: Query, note: list[Any] = note) -> Prediction:
                    spans = [(span.start, span.stop, span.visible) for span in query.spans]
                    note.append((spans, query.position.tolist()))
                    return predictor()(query)

                (events,) = events_of([each], predict)
                note += [replace(event) for event in events]
            assert asked[0] == asked[1]
            assert rows[0].told == rows[1].told and rows[0].forwards == rows[1].forwards


def test_what_each_text_costs_counts() -> None:
    """Without a temperature all of four are the same, and each takes its forwards."""
    base = alone("topk", {"k": 3}, choice=TokenChoice())
    four = row(smc("topk", {"k": 3}, particles=4), choice=TokenChoice())
    finish([base, four], predictor())
    assert four.forwards == 4 * base.forwards and four.told == base.told


def test_one_step_of_four_texts_counts_four_forwards() -> None:
    four = row(smc("topk", particles=4))
    asked: list[int] = []
    steps = run([four], lambda query: (asked.append(query.generations), predictor()(query))[1])
    ((_, event),) = next(steps)
    assert asked == [4] and four.forwards == event.forward == 4 and not event.positions


def test_each_text_has_its_own_random_stream() -> None:
    """Never drawn anew, text i is the base sampler's with the i-th seed; the likeliest wins."""
    four = row(smc("topk", {"k": 2}, particles=4, ess=0.0))
    lanes = list(four.lanes)
    seeds = [slot_seed(5, i) for i in range(4)]
    assert seeds[0] == 5 and len(set(seeds)) == 4
    own = [alone("topk", {"k": 2}, seed=seed) for seed in seeds]
    each = events_of(own, predictor())
    (events,) = events_of([four], predictor())
    likely = [sum(torch.tensor(e.confidences).double().log().sum() for e in story) for story in each]
    best = int(torch.tensor(likely).argmax())
    assert len({str(found.told) for found in own}) == 4
    for i in range(1, 4):
        assert lanes[i].told == own[i].told
    assert four.told == own[best].told and four.canvas.generated.tolist() == own[best].canvas.generated.tolist()
    assert four.forwards == sum(found.forwards for found in own)
    won = [event for event in events if event.positions]
    assert [(e.positions, e.tokens, e.confidences) for e in won] == [
        (e.positions, e.tokens, e.confidences) for e in each[best]
    ]
    assert won[-1].forward == four.forwards and won[-1].settled == len(four.told) == 12
    assert [token for event in events for token in event.text_tokens] == four.text_tokens()


@pytest.mark.parametrize("cache", list(CacheMode))
def test_a_result_never_depends_on_neighbours(cache: CacheMode) -> None:
    def make() -> list[Row]:
        return [
            row(smc(particles=3, ess=1.0), seed=1, cache=cache, end_ids=frozenset({7})),
            row(smc("topk", {"k": 2}, particles=2, ess=1.0), seed=2, gen=7, cache=cache),
            alone("random", seed=3, gen=15),
            row(smc(particles=5, ess=1.0), seed=4, cache=cache, block=12),
        ]

    together = make()
    finish(together, predictor())
    for a, b in zip(together, make(), strict=True):
        finish([b], predictor())
        assert (a.told, a.forwards, a.canvas.tokens.tolist()) == (b.told, b.forwards, b.canvas.tokens.tolist())


KEEPS = {
    "steps": StateSpec(0, torch.int64, lives="generation"),
    "places": StateSpec(0, torch.int64, per="position", lives="generation"),
}


class Two(Sampler[SamplerParams]):
    """Commit the surest on two canvases; after every step, or block, go on with the first, and give it its state."""

    name = "two"
    state = KEEPS

    def __init__(self, barrier: str = "step", ancestors: tuple[int, int] = (0, 0), **changes: Any) -> None:
        self.barrier, self.ancestors, self.changes = barrier, ancestors, changes  # type: ignore[misc, assignment]
        self.seen: list[Slots[SamplerParams]] = []

    def slots(self, params: SamplerParams) -> int:
        return 2

    def select(self, step: Step) -> Selection:
        if self.changes.get("fails") and bool((step.slot == 1).any()) and bool((step.forward > 0).any()):
            raise ValueError("the second canvas")
        commit = surest(step.confidence, step.candidate)
        state = {
            "steps": step.state["steps"] + step.slot + 1,
            "places": step.state["places"] + commit * (step.slot + 1),
        }
        return Selection(commit, state=state)

    def resample(self, slots: Slots[SamplerParams]) -> Resampling:
        self.seen.append(slots)
        return Resampling(torch.tensor(self.ancestors))

    def winner(self, slots: Slots[SamplerParams]) -> int:
        return int(self.changes.get("winner", 1))


def test_drawing_anew_copies_canvas_masks_and_state_but_no_random_stream() -> None:
    each = row((Two(), SamplerParams()))
    first, second = each.lanes
    steps = run([each], predictor())
    for number in range(1, 6):
        next(steps)
        assert first.canvas.tokens.equal(second.canvas.tokens) and first.canvas.masked.equal(second.canvas.masked)
        assert int((~second.canvas.masked).sum()) == number
        batch = each.batch
        assert batch is not None
        layer = batch.groups[each.key].layers[0]
        for kept in layer.state.values():
            assert kept[first.slot].equal(kept[second.slot])
        assert layer.state["steps"][second.slot].item() == number
        assert layer.state["places"][second.slot].sum().item() == number
        seeds = batch.numbers[[first.slot, second.slot]][:, [N.SEED, N.SLOT]].tolist()
        assert seeds == [[5, 0], [slot_seed(5, 1), 1]]
        assert first.told == second.told and first.settled == second.settled


def test_streams_go_apart_again_after_a_block() -> None:
    each = row((Two("block"), SamplerParams()), gen=8, choice=TokenChoice(3.0))
    first, second = each.lanes
    steps = run([each], predictor())
    for _ in range(4):
        next(steps)
    assert first.canvas.tokens.equal(second.canvas.tokens)
    for _ in range(3):
        next(steps)
    assert not first.canvas.tokens.equal(second.canvas.tokens)


@pytest.mark.parametrize("barrier", ["step", "block"])
def test_canvases_wait_for_each_other(barrier: str) -> None:
    """A threshold takes unequal numbers of steps; a block begins for all at once."""
    if barrier == "block":
        each = row(smc("threshold", {"threshold": 0.4}, particles=4, ess=0.0), gen=16)
    else:
        each = row((Two(barrier), SamplerParams()), gen=16)
    blocks: list[set[int]] = []

    def predict(query: Query) -> Prediction:
        blocks.append({lane.block for lane in each.lanes if any(c is lane.canvas for c in query.canvases)})
        return predictor()(query)

    finish([each], predict)
    assert all(len(found) == 1 for found in blocks)


def test_numbers_and_ends_at_a_barrier() -> None:
    rule = Two("block")
    finish([row((rule, SamplerParams()), gen=12), row((rule, SamplerParams()), gen=8, seed=6)], predictor())
    uniform = [slots.uniform for slots in rule.seen]
    assert len(set(uniform)) == len(uniform) == 3 and all(0 <= number < 1 for number in uniform)
    assert all(slots.finished.tolist() == [False, False] for slots in rule.seen), "none is drawn when all have ended"
    assert all(set(slots.state) == {"steps"} for slots in rule.seen)


@pytest.mark.parametrize("winner", [0, 1])
def test_the_winners_text_is_told(winner: int) -> None:
    each = row((Two("block", (0, 1), winner=winner), SamplerParams()))
    lanes = list(each.lanes)
    found = [alone("topk", seed=slot_seed(5, i)) for i in range(2)]
    (events,) = events_of([each], predictor())
    finish(found, predictor())
    assert each.told == found[winner].told and lanes[1].told == found[1].told
    assert all(not event.text_tokens and event.settled == 0 for event in events if not event.positions)


@pytest.mark.parametrize("fill", [False, True])
def test_texts_end_inside(fill: bool) -> None:
    ended = 0
    for seed in range(8):
        each = row(
            smc("topk", {"k": 2}, particles=3, ess=1.0), end_ids=frozenset({4, 7}), fill_after_end=fill, seed=seed
        )
        (events,) = events_of([each], predictor())
        assert each.finished and all(event.error is None for event in events)
        text = each.canvas.generated.tolist()
        if each.ended:
            ended += 1
            assert each.end is not None and text[each.end] in (4, 7) and each.told == text[: each.end + 1]
            filled = [place for event in events for place in event.filled]
            assert all(place > each.end for place in filled) or fill
        else:
            assert each.told == text
        assert not any(token in (4, 7) for token in each.text_tokens())
        assert [token for event in events for token in event.text_tokens] == each.text_tokens()
        assert each.batch is not None and sum(found is not None for found in each.batch.rows) == 1
    assert ended > 0


def test_a_failing_canvas_fails_its_generation_only() -> None:
    bad, good = row((Two(fails=True), SamplerParams())), row(smc(particles=3))
    clean = row(smc(particles=3))
    finish([clean], predictor())
    failed, fine = events_of([bad, good], predictor())
    assert "sampler two failed: ValueError: the second canvas" in str(failed[-1].error) and len(failed) == 2
    assert all(event.error is None for event in fine) and good.told == clean.told


def test_a_forward_of_one_canvas_that_is_not_finite_fails_its_generation_only() -> None:
    bad, good = row(smc(particles=3), seed=8), row(smc(particles=3))
    finish([clean := row(smc(particles=3))], predictor())

    def logits(canvas: Canvas) -> Tensor:
        out = random_logits(canvas)
        return out * torch.nan if any(canvas is lane.canvas for lane in bad.lanes[1:2]) else out

    failed, fine = events_of([bad, good], predictor(logits))
    assert [str(event.error) for event in failed] == ["the model's output is not finite"]
    assert all(event.error is None for event in fine) and good.told == clean.told


def test_released_canvases_leave_their_slots() -> None:
    each = row(smc(particles=4))
    steps = run([each], predictor())
    next(steps)
    batch = each.batch
    assert batch is not None and sum(found is not None for found in batch.rows) == 4
    each.release()
    assert not any(batch.rows)


@pytest.mark.parametrize(
    ("base", "params", "field"),
    [
        ("edit", {}, "base"),
        ("smc", {}, "base"),
        ("policy", {}, "base"),
        ("diffusion_gemma", {}, "base"),
        ("nothing", {}, "base"),
        ("topk", {"k": 0}, "base_params.k"),
        ("topk", {"threshold": 0.5}, "base_params.threshold"),
        ("topk", {"k": 1, "steps": 2}, "base_params"),
    ],
)
def test_bases_and_their_parameters_are_checked(base: str, params: dict[str, Any], field: str) -> None:
    with pytest.raises(ParameterError) as caught:
        smc(base, params)
    assert caught.value.field == field


def test_the_bases_own_checks_hold() -> None:
    with pytest.raises(ParameterError, match="3 blocks need at least 3"):
        row(smc("topk", {"steps": 2}))
    with pytest.raises(ParameterError, match="chooses tokens itself"):
        row(smc("credit"))


def test_without_a_base_it_says_so() -> None:
    with pytest.raises(ParameterError, match="has not been given its base"):
        row((get_sampler("smc"), SMCParams()))


def test_events_of_a_text_that_wins_are_in_order() -> None:
    each = row(smc("topk", {"k": 2}, particles=3, ess=1.0), gen=16)
    (events,) = events_of([each], predictor())
    told = [event for event in events if event.positions]
    assert sorted(place for event in told for place in event.positions) == list(range(16))
    forwards = [event.forward for event in told]
    assert forwards == sorted(set(forwards)) and forwards[-1] == each.forwards
    assert isinstance(told[0], StepEvent) and not isinstance(told[-1].error, SamplerError)
