"""Samplers that never end, that wait, and that answer beside the point: what the loop itself holds against them."""

import signal
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from samplers import (
    AttentionPattern,
    Canvas,
    Sampler,
    SamplerError,
    SamplerParams,
    Selection,
    Step,
    StepContext,
    TokenChoice,
    TokenChoices,
)
from samplers.forward.query import Query
from samplers.loop.event import StepEvent
from samplers.loop.guard import MOST_NUMBERS, shown, told, why_not
from samplers.loop.hooks import MOST_STEPS
from samplers.loop.row import Row
from samplers.loop.run import finish
from samplers.loop.traits import Traits
from tests.samplers.models import MASK, VOCAB, events_of, predictor, turn

PREDICT = predictor()


class NeverDone(Sampler):
    """Revises, opens again all that it may, and is never content."""

    name = "never_done"
    revises = True
    steps: Any = 3

    def post_steps(self, params: SamplerParams) -> int:
        return self.steps

    def select(self, step: Step) -> Selection:
        done = torch.zeros(len(step.params), dtype=torch.bool)
        return Selection(torch.zeros_like(step.candidate), remask=step.committed, done=done)


class NeverCommits(Sampler):
    """Drafts the same for ever."""

    name = "never_commits"
    drafts = True
    steps: Any = 3

    def draft_steps(self, params: SamplerParams) -> int:
        return self.steps

    def select(self, step: Step) -> Selection:
        return Selection(torch.zeros_like(step.candidate), draft=torch.ones_like(step.token))


class Waits(Sampler):
    """Commits nothing, and says so."""

    name = "waits"

    def select(self, step: Step) -> Selection:
        return Selection(torch.zeros_like(step.candidate), waits=True)


class Changes(Sampler):
    """Answers what it is told to."""

    name = "changes"

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def select(self, step: Step) -> Selection:
        return Selection(torch.zeros_like(step.candidate))

    def name_tokens(self, context: StepContext) -> Tensor | None:
        return self.answers.get("named")

    def choice(self, context: StepContext) -> TokenChoices | None:
        return self.answers.get("choice")


class Rewrites(Sampler):
    """Fails for several rows at once; asked for one, overwrites what it said of those before."""

    name = "rewrites"

    def __init__(self) -> None:
        self.said: list[Tensor] = []

    def select(self, step: Step) -> Selection:
        if len(step.params) > 1:
            raise ValueError("one at a time")
        for commit in self.said:
            commit.fill_(True)
        self.said.append(torch.zeros_like(step.candidate).index_fill_(1, torch.tensor([1]), True))
        return Selection(self.said[-1])


def row(sampler: Sampler, length: int = 6, block: int | None = 3, **options: Any) -> Row:
    mask, pattern = (None, AttentionPattern(noise=VOCAB)) if sampler.drafts else (MASK, AttentionPattern())
    return Row(Canvas.blank([1], length, mask, block, pattern=pattern), sampler, SamplerParams(), **options)


def forwards(each: Row, most: int) -> int:
    """Forwards until the end, none beyond so many."""
    (events,) = events_of([each], predictor(mask_id=None if each.traits.drafts else MASK), most)
    assert all(event.error is None for event in events)
    assert each.finished, f"it goes on after {most} forwards"
    return each.forwards


def turn_and_query(rows: list[Row]) -> tuple[list[StepEvent], Query]:
    """A step, and what the model was asked in it."""
    asked: list[Query] = []
    events = turn(rows, lambda query: (asked.append(query), PREDICT(query))[1])
    return events, asked[0]


def test_one_that_is_never_done_ends_with_its_bound() -> None:
    assert forwards(row(NeverDone()), 100) == 2 * (2 * 3 + 3)


def test_one_that_never_commits_ends_with_its_steps() -> None:
    assert forwards(row(NeverCommits()), 100) == 2 * 3


def test_one_that_commits_nothing_ends_all_the_same() -> None:
    assert forwards(row(Changes()), 100) == 6


def test_a_block_in_which_all_is_given_has_a_bound_too() -> None:
    each = row(NeverDone())
    canvas = Canvas.blank([1], 6, MASK, 3)
    canvas.generated[:3], canvas.masked[:3] = 7, False
    each = Row(canvas, each.sampler, each.params)
    assert forwards(each, 100) == 2 * (2 * 3 + 3)


@pytest.mark.parametrize("kind", [NeverDone, NeverCommits])
@pytest.mark.parametrize("steps", [10**12, MOST_STEPS + 1, -1, torch.nan, "many", None, 1.5])
def test_a_bound_that_is_none_is_refused(kind: type[Sampler], steps: Any) -> None:
    sampler = kind()
    sampler.steps = steps  # type: ignore[attr-defined]
    with pytest.raises(SamplerError, match=r"failed: (post|draft)_steps must be an integer from [01] to 10000, not "):
        row(sampler)


def test_no_steps_to_draft_in_are_refused() -> None:
    sampler = NeverCommits()
    sampler.steps = 0
    with pytest.raises(SamplerError, match="draft_steps must be an integer from 1 to"):
        row(sampler)


def test_waiting_is_refused_unless_the_driver_allows_it() -> None:
    each = row(Waits())
    with pytest.raises(SamplerError, match="sampler waits failed: it waits, which only training may"):
        finish([each], PREDICT)
    assert each.forwards == 0
    for count in (1, 2, 3):
        (event,) = turn([each], PREDICT, may_wait=True)
        assert event.error is None and not event.positions and each.forwards == count


def test_one_that_fails_before_the_forward_is_in_it_and_asked_for_nothing_beside() -> None:
    rows = [row(Changes(named=[1])), row(Changes(named=torch.ones(1, 3, 2, dtype=torch.int32)))]
    (bad, good), query = turn_and_query(rows)
    assert len(query.canvases) == 2
    assert query.wanted.named is not None and query.wanted.named.tolist() == [[-1, -1]] * 3 + [[1, 1]] * 3
    assert bad.error is not None and good.error is None and good.positions
    assert rows[0].forwards == 0


def choices(temperature: float, top_p: float = 1.0, top_k: int = 0) -> TokenChoices:
    each = TokenChoices.of([TokenChoice(temperature, top_p, top_k)])
    return TokenChoices(each.temperature[:, None], each.top_p[:, None], each.top_k[:, None])


def test_a_choice_that_is_none_leaves_the_requests_own() -> None:
    each = row(Changes(choice=choices(torch.nan)), choice=TokenChoice(0.5))
    (event,), query = turn_and_query([each])
    assert event.error is not None
    assert query.wanted.choices is not None and query.wanted.choices.temperature.tolist() == [0.5] * 3


def test_a_choice_of_the_samplers_goes_before_the_requests() -> None:
    each = row(Changes(choice=choices(0.25, 0.5, 3)), choice=TokenChoice(0.5))
    _, query = turn_and_query([each])
    found = query.wanted.choices
    assert found is not None
    assert [found.temperature.tolist(), found.top_p.tolist(), found.top_k.tolist()] == [[0.25] * 3, [0.5] * 3, [3] * 3]


def test_as_many_names_as_a_region_has_positions_are_allowed() -> None:
    for most, refused in ((MOST_NUMBERS, False), (MOST_NUMBERS + 1, True)):
        (event,) = turn([row(Changes(named=torch.ones(1, 3, most, dtype=torch.int64)))], PREDICT)
        assert (event.error is not None) == refused


@pytest.mark.parametrize(
    ("value", "expected"),
    [("plain", "plain"), ("two\nlines\x1b[31m", "two lines [31m"), ("x" * 400, "x" * 297 + "..."), ("\ud800", " ")],
)
def test_a_text_is_shown_in_one_short_line(value: str, expected: str) -> None:
    assert shown(value) == expected


def test_traits_are_read_once() -> None:
    sampler = Changes()
    each = row(sampler)
    sampler.revises, sampler.top = True, 3
    finish([each], PREDICT)
    own = Traits(frozenset(), 0, False, False, False, False, False, hooks=(frozenset({"name_tokens", "choice"}),))
    assert each.finished and each.traits == own


def test_what_a_sampler_said_of_one_row_it_cannot_take_back_at_the_next() -> None:
    sampler = Rewrites()
    rows = [row(sampler), row(sampler), row(sampler)]
    assert [event.positions for event in turn(rows, PREDICT)] == [[1]] * 3


def test_only_a_users_interrupt_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    # A process in the background may ignore interrupts.
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        told(Changes(), interrupted)
    monkeypatch.setattr(signal, "getsignal", lambda number: print)
    with pytest.raises(BaseException) as caught:  # whatever it is
        told(Changes(), interrupted)
    assert str(caught.value) == "sampler changes failed: KeyboardInterrupt: "


def test_one_that_cannot_say_whether_it_fits_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise SystemExit("not today")

    sampler = Changes()
    assert why_not(sampler, AttentionPattern()) is None
    monkeypatch.setattr(sampler, "incompatibility", fails)
    assert why_not(sampler, AttentionPattern()) == "sampler changes failed: SystemExit: not today"


class Refuses(TorchFunctionMode):
    """Sees every operation, and refuses it."""

    def __torch_function__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


class RefusesDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no")


def test_settings_of_torchs_are_put_back() -> None:
    for change in (
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
        lambda: torch.set_grad_enabled(False),
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.device("meta").__enter__(),
        Refuses().__enter__,
        RefusesDispatch().__enter__,
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__,
    ):
        before = settings()
        with pytest.raises(
            SamplerError, match=r"sampler changes failed: (it left torch's settings changed|RuntimeError: no)"
        ):
            told(Changes(), change)
        assert settings() == before


def settings() -> list[object]:
    made = torch.zeros(1)
    numbers: list[object] = [torch.get_num_threads(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()]
    numbers.append(torch.is_autocast_enabled("cpu"))
    return [made.dtype, made.device, *numbers]
