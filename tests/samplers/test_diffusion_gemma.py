"""DiffusionGemma's rule, on predictions that are made up."""

from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import AttentionPattern, Canvas, ParameterError, Selection, Step, get_sampler, list_samplers
from samplers.drafting.diffusion_gemma import DiffusionGemma
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.statistics import Statistic
from samplers.loop.event import StepEvent
from samplers.loop.row import Row
from samplers.loop.run import finish, run
from tests.samplers import models
from tests.samplers.models import MASK, VOCAB, Logits, predictor, random_logits
from tests.samplers.steps import step_of

RULE = get_sampler("diffusion_gemma")
SCHEME = AttentionPattern(noise=VOCAB, drafted=6)


def row(seed: int = 0, gen_length: int = 15, block_length: int | None = None, **params: Any) -> Row:
    canvas = Canvas.blank([3, 5], gen_length, None, block_length, pattern=SCHEME)
    return Row(canvas, RULE, RULE.Params(**params), seed=seed)


def turn(each: Row, logits: Logits = random_logits) -> StepEvent:
    (event,) = models.turn([each], predictor(logits, None))
    assert event.error is None
    return event


def step(entropy: list[float], drawn: list[int], likeliest: list[int], **params: Any) -> Step:
    """A first step of one block."""
    width = len(entropy)
    extra = {
        Statistic.CHOSEN_ENTROPY: torch.tensor([entropy]),
        Statistic.LIKELIEST: torch.tensor([likeliest], dtype=torch.float32),
    }
    return step_of(
        RULE,
        [RULE.Params(**params)],
        torch.full((1, width), 0.5),
        layout=row(gen_length=width, block_length=width).canvas.layout,
        token=torch.tensor([drawn]),
        extra=extra,
        top=torch.full((1, width, 1), 0.75),
    )


class Silent(DiffusionGemma):
    """Whose noise is a token that nobody else chooses."""

    def noise(self, step: Step) -> Tensor:
        return torch.full_like(step.token, 11)


@pytest.mark.parametrize(
    ("bound", "kept"), [(0.1, [1, 2, 3]), (0.0, [1]), (0.02, [1, 3]), (0.13, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])]
)
def test_the_surest_are_kept_while_those_before_them_sum_up_to_the_bound(bound: float, kept: list[int]) -> None:
    """Sums before, in order of entropy: 0, .02, .07, .13, .43."""
    asked = step([0.30, 0.02, 0.06, 0.05, 0.90], [1, 2, 3, 4, 5], [6] * 5, entropy_bound=bound + 1e-6 * (bound > 0))
    chosen = Silent().select(asked)
    assert chosen.draft is not None
    assert chosen.draft[0].tolist() == [[1, 2, 3, 4, 5][i] if i in kept else 11 for i in range(5)]
    assert not chosen.commit.any()


def test_what_is_committed_is_the_likeliest_not_what_was_drawn() -> None:
    chosen = RULE.select(step([0.1, 0.2], [1, 2], [6, 7], stability_threshold=0, confidence_threshold=0.16))
    assert chosen.commit.all() and chosen.token is not None and chosen.confidence is not None
    assert (chosen.token.tolist(), chosen.confidence.tolist()) == ([[6, 7]], [[0.75, 0.75]])
    assert not RULE.select(
        step([0.1, 0.2], [1, 2], [6, 7], stability_threshold=0, confidence_threshold=0.15)
    ).commit.any()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_it_waits_for_as_many_steady_steps(steps: int) -> None:
    """A model that always says the same ends a block after as many steps as must be like the last, and that one."""

    def steady(canvas: Canvas) -> Tensor:
        return torch.eye(VOCAB)[torch.arange(canvas.layout.length) % VOCAB] * 50

    each = row(gen_length=12, stability_threshold=steps)
    committed = [len(event.positions) for event in models.events_of([each], predictor(steady, None))[0]]
    assert committed == [*[0] * steps, 6] * 2, "each block for itself"
    assert each.canvas.generated.tolist() == [(2 + i) % VOCAB for i in range(12)]


def test_the_temperature_falls_from_the_highest() -> None:
    each = row(t_min=0.4, t_max=0.8, max_denoising_steps=4, gen_length=12)
    seen = []

    def predict(query: Query) -> Prediction:
        assert query.wanted.choices is not None
        seen.extend(query.wanted.choices.temperature.unique().tolist())
        return predictor(mask_id=None)(query)

    finish([each], predict)
    assert seen == pytest.approx([0.8, 0.7, 0.6, 0.5] * 2)


def test_a_block_is_open_as_a_whole_until_it_is_settled_as_a_whole() -> None:
    """What is told as settled never changes; the draft does; a block begins with noise when its turn comes."""
    each = row(max_denoising_steps=3, confidence_threshold=0.0)
    begun = each.canvas.generated.tolist()
    assert any(begun[:6]) and not any(begun[6:]), "only the first block has noise in it"
    settled, drafts = [], []
    before: list[int] = []
    for ((_, event),) in run([each], predictor(mask_id=None)):
        assert each.canvas.generated[: len(before)].tolist() == before
        before = each.canvas.generated[: each.settled].tolist()
        settled.append(each.settled)
        drafts.append(len(event.draft))
    assert settled == [0, 0, 6, 6, 6, 12, 12, 12, 18]
    assert drafts == [6, 6, 0, 6, 6, 0, 6, 6, 0]
    assert each.told == each.canvas.generated[:15].tolist(), "the last block is cut where the text ends"


def test_seeds_differ_and_reproduce() -> None:
    def text(seed: int) -> tuple[list[int], list[int]]:
        each = row(seed, max_denoising_steps=4, entropy_bound=2.0)
        begun = each.canvas.generated[:6].tolist()
        finish([each], predictor(mask_id=None))
        return begun, each.canvas.generated.tolist()

    found = [text(seed) for seed in range(6)]
    assert [text(seed) for seed in range(6)] == found
    assert len({str(begun) for begun, _ in found}) == len({str(end) for _, end in found}) == 6


def test_noise_is_any_token_alike() -> None:
    """Of 6,000 numbers each of 12 tokens has 500, give or take what chance allows, at the start and after a step."""
    rows = [row(seed, 6, entropy_bound=0.0) for seed in range(1000)]
    for _ in range(2):
        found = torch.bincount(torch.cat([each.canvas.generated for each in rows]), minlength=VOCAB)
        assert len(found) == VOCAB and (found - 500).abs().max() < 120
        models.turn(rows, predictor(lambda canvas: torch.zeros(canvas.layout.length, VOCAB), None))
    assert rows[0].forwards == 2


def test_an_end_of_text_settles_what_follows() -> None:
    def ends(canvas: Canvas) -> Tensor:
        return torch.eye(VOCAB)[torch.tensor([7 if i == 4 else 9 for i in range(canvas.layout.length)])] * 50

    each = Row(row().canvas, RULE, RULE.Params(), end_ids=frozenset({7}))
    finish([each], predictor(ends, None))
    assert (each.end, each.completion_tokens, each.text_tokens(), each.forwards) == (2, 3, [9, 9], 2)


def test_models_and_samplers_that_do_not_fit_are_refused() -> None:
    masked = Canvas.blank([1], 8, MASK)
    drafted = Canvas.blank([1], 8, None, pattern=SCHEME)
    for sampler in list_samplers():
        wrong = masked if sampler.drafts else drafted
        with pytest.raises(ParameterError, match="mask token") as caught:
            Row(wrong, sampler, sampler.Params())
        assert caught.value.field == "sampler"


class Careless(DiffusionGemma):
    """Breaks the contract."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def select(self, step: Step) -> Selection:
        return Selection(torch.zeros_like(step.candidate), **self.changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "must say what the candidates hold"),
        ({"draft": torch.zeros(1, 6)}, "tokens must be integers"),
        ({"draft": torch.zeros(1, 3, dtype=torch.int64)}, "draft must be of shape [1, 6], not [1, 3]"),
        ({"draft": torch.full((1, 6), VOCAB)}, "does not exist"),
        ({"draft": torch.full((1, 6), -1)}, "does not exist"),
    ],
)
def test_a_draft_that_is_none_is_noticed(changes: dict[str, Any], said: str) -> None:
    each = Row(row().canvas, Careless(**changes), RULE.Params())
    (outcome,) = models.turn([each], predictor(mask_id=None))
    assert outcome.error is not None and said in str(outcome.error)
    assert each.forwards == 0
