"""What a third party's sampler or modifier may do wrong, in the bare loop: its own generation fails, and no other."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from samplers import (
    Adjustment,
    Canvas,
    Modifier,
    ParameterError,
    Sampler,
    SamplerError,
    Selection,
    Step,
    StepContext,
    TokenBonus,
    View,
    get_sampler,
)
from samplers.loop.guard import own_params
from samplers.loop.row import Row
from samplers.resources import bound
from tests.engine.hostile import (
    FAR,
    HARMLESS,
    KEEPS,
    NAME,
    SINGLE,
    THROWN,
    WHOLE,
    Leftmost,
    Odd,
    Params,
    faulty,
    overwrite,
)
from tests.samplers.models import MASK, VOCAB, events_of, predictor

NEIGHBOURS = ("random", "credit", "edit")
Told = tuple[list[int], int]


@pytest.fixture(scope="module")
def away() -> Iterator[ThreadPoolExecutor]:
    """A thread for loops, as in a server; the first thread is a user's, whose interrupts pass."""
    with ThreadPoolExecutor(1) as pool:
        yield pool


def start(sampler: Sampler, number: int, **options: Any) -> Row:
    params = own_params(sampler, options.pop("params", None) or sampler.Params())
    return Row(Canvas.blank([number + 1], 4, MASK), sampler, params, seed=number, vocabulary=VOCAB, **options)


def others(twin: Sampler | None) -> list[Row]:
    """Three generations, and one of the hostile sampler's own that is to go well."""
    rows = [start(get_sampler(name), i) for i, name in enumerate(NEIGHBOURS)]
    return rows if twin is None else [*rows, start(twin, 7)]


@cache
def clean(hostile: bool) -> list[Told]:
    """What the others say where nothing goes wrong."""
    rows = others(Leftmost() if hostile else None)
    events_of(rows, predictor())
    return told(rows)


@cache
def clean_modified() -> list[Told]:
    rows = [*others(None), *modified(2, Around())]
    events_of(rows, predictor())
    return told(rows)


def modified(count: int, around: Modifier) -> list[Row]:
    """Generations with a modifier that are to go well."""
    each = [(around, around.Params())]
    return [start(get_sampler("threshold"), 10 + i, modifiers=each) for i in range(count)]


def told(rows: Sequence[Row]) -> list[Told]:
    return [(row.told, row.forwards) for row in rows]


def beside(sampler: Sampler, twin: bool) -> str | None:
    """Run one that is to fail among others, and see that these are as they were; returns its message."""
    rows = others(sampler if twin else None)
    try:
        bad = start(sampler, 8, params=sampler.Params(fault=True))
    except (SamplerError, ParameterError) as error:
        return str(error)
    *found, mine = events_of([*rows, bad], predictor())
    assert told(rows) == clean(twin)
    assert all(event.error is None for events in found for event in events)
    error = mine[-1].error
    assert all(event.error is None for event in mine[:-1])
    assert error is not None or bad.finished
    assert torch.get_default_dtype() is torch.float32
    return None if error is None else str(error)


@pytest.mark.parametrize("fault", SINGLE)
def test_a_row_that_fails_harms_neither_others_nor_its_like(fault: str, away: ThreadPoolExecutor) -> None:
    message = away.submit(beside, SINGLE[fault](), True).result(30)
    assert message is not None and message.startswith(f"sampler {NAME} failed: ")
    assert len(message) <= 500 and message.isprintable()


@pytest.mark.parametrize("fault", WHOLE)
def test_a_sampler_that_is_wrong_as_such_harms_no_other(fault: str, away: ThreadPoolExecutor) -> None:
    message = away.submit(beside, WHOLE[fault](), False).result(30)
    assert message and len(message) <= 700 and message.isprintable()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "must return a Selection"),
        ("bonus of two", "a bonus must be a TokenBonus or None"),
        ("bonus nan", "is not finite"),
        ("chooses in words", "must be TokenChoices or None"),
        ("window in words", "must be a Window or None"),
        ("resample numbers", "must return a Resampling or None"),
        ("state of another name", "it keeps a state that it has not declared"),
        ("incompatibility number", "must say why in words"),
        ("waits at no barrier", "barrier is neither step nor block"),
    ],
)
def test_what_is_wrong_is_said(fault: str, words: str, away: ThreadPoolExecutor) -> None:
    message = away.submit(beside, (SINGLE | WHOLE)[fault](), False).result(30)
    assert message is not None and words in message and "output" not in message


@pytest.mark.parametrize("fault", HARMLESS)
def test_what_a_sampler_may_try_changes_nothing_for_others(fault: str, away: ThreadPoolExecutor) -> None:
    message = away.submit(beside, HARMLESS[fault](), HARMLESS[fault].revises is False).result(30)
    assert message is None or message.startswith(f"sampler {NAME} failed: ")


class Around(Modifier[Params]):
    """Changes nothing, and counts the steps."""

    name = NAME
    Params = Params
    state = KEEPS

    def adjust(self, step: Step) -> Adjustment | None:
        return Adjustment(state={"steps": step.state["steps"] + 1})


def fault(name: str, do: Callable[..., Any]) -> Modifier:
    """A modifier of which one method does something else where it is to fail."""
    plain = getattr(Around, name)

    def method(self: Modifier, *arguments: Any) -> Any:
        first = arguments[0]
        asked = bool(faulty(first).any()) if isinstance(first, StepContext) else getattr(first, "fault", False) is True
        return do(*arguments) if asked else plain(self, *arguments)

    return type("Hostile", (Around,), {name: method})()


def own_rows(step: Step, found: Any) -> Any:
    """Tensors that could be any row's, but for the rows that are not to fail."""
    usual = {name: getattr(step, name) for name in ("token", "confidence", "candidate")}
    usual["commit"] = step.candidate
    for name, plain in usual.items():
        value = getattr(found, name, None)
        if type(value) is Tensor and (value.device, value.shape, value.dtype) == (
            plain.device,
            plain.shape,
            plain.dtype,
        ):
            found = replace(found, **{name: value.where(faulty(step), plain)})
    return found


def adjusting(**parts: Callable[[Step], Any]) -> Modifier:
    return fault(
        "adjust", lambda step: own_rows(step, Adjustment(**{name: part(step) for name, part in parts.items()}))
    )


def seen(*views: Any) -> Modifier:
    return fault("views", lambda params, before: views)


def after(change: Callable[[Step, Selection], Any]) -> Modifier:
    def changed(step: Step, selection: Selection) -> Any:
        found = own_rows(step, change(step, selection))
        return (
            replace(found, commit=found.commit.where(faulty(step), selection.commit))
            if type(found) is Selection and found.commit.shape == selection.commit.shape
            else found
        )

    return fault("after", changed)


MODIFIERS: dict[str, Modifier] = {
    **{f"{name} raises": fault(name, THROWN["error"]) for name in ("views", "check", "adjust", "after", "bonus")},
    **{f"{name} exits": fault(name, THROWN["exit"]) for name in ("views", "check", "name_tokens", "adjust", "after")},
    **{f"adjusts: {name}": fault("adjust", do) for name, do in THROWN.items()},
    "sees nothing": seen(),
    "sees a number": fault("views", lambda params, before: 5),
    "sees numbers": seen(1, 2),
    "sees much": seen(*[View()] * 9),
    "sees anything but the canvas": seen(View(1.0, "masked")),
    "sees with a weight that is none": seen(View(torch.nan)),
    "sees without end": seen(View(), View(torch.inf, "masked")),
    "sees in words": seen(View(), View("much", "masked")),  # type: ignore[arg-type]
    "sees another prompt": seen(View(), View(-1.0, "empty")),  # type: ignore[arg-type]
    "sees a prompt of words": seen(View(), View(-1.0, ("a", "b"))),  # type: ignore[arg-type]
    "sees a list": seen(View(), View(-1.0, [1, 2])),  # type: ignore[arg-type]
    "sees a number of prompts": seen(View(), View(-1.0, 5)),  # type: ignore[arg-type]
    "sees tokens far": seen(View(), View(-1.0, (1, FAR))),
    "sees a token more": seen(View(), View(-1.0, (1, VOCAB))),
    "sees tokens negative": seen(View(), View(-1.0, (1, -1))),
    "sees much text": seen(View(), View(-1.0, (1,) * (1 << 21))),
    "adjusts numbers": fault("adjust", lambda step: 5),
    "adjusts by a selection": fault("adjust", lambda step: Selection(step.candidate)),
    "adjusts to floats": adjusting(token=lambda step: step.confidence),
    "adjusts to narrow tokens": adjusting(token=lambda step: step.token[:, 1:]),
    "adjusts to tokens far": adjusting(token=lambda step: step.token + FAR),
    "adjusts to masks": adjusting(token=lambda step: torch.full_like(step.token, MASK)),
    "adjusts to tokens elsewhere": adjusting(token=lambda step: step.token.to("meta")),
    "adjusts to tokens before": adjusting(token=lambda step: step.token * 0 - 1),
    "adjusts confidence to integers": adjusting(confidence=lambda step: step.token),
    "adjusts confidence to nothing": adjusting(confidence=lambda step: step.confidence * torch.nan),
    "adjusts confidence above one": adjusting(confidence=lambda step: step.confidence + 7),
    "adjusts confidence below zero": adjusting(confidence=lambda step: torch.full_like(step.confidence, -torch.inf)),
    "adjusts confidence of odd kind": adjusting(confidence=lambda step: step.confidence.as_subclass(Odd)),
    "adjusts candidates to integers": adjusting(candidate=lambda step: step.candidate.long()),
    "adjusts candidates to more": adjusting(candidate=lambda step: torch.ones_like(step.candidate)),
    "adjusts candidates to none": adjusting(candidate=lambda step: torch.zeros_like(step.candidate)),
    "keeps what is not its own": adjusting(state=lambda step: {"token": step.state["seen"]}),
    "keeps a number": adjusting(state=lambda step: 5),
    "keeps what is wide": adjusting(state=lambda step: {"seen": step.confidence}),
    "keeps integers": adjusting(state=lambda step: {"seen": step.state["seen"].long()}),
    "selects nothing": after(lambda step, selection: None),
    "selects a number": after(lambda step, selection: 5),
    "selects numbers": after(lambda step, selection: Selection(step.token)),
    "selects narrowly": after(lambda step, selection: Selection(step.candidate[:, :1])),
    "selects what is no candidate": after(lambda step, selection: Selection(~step.candidate)),
    "selects tokens far": after(lambda step, selection: Selection(step.candidate, token=step.token + FAR)),
    "selects masks": after(lambda step, selection: Selection(step.candidate, token=step.token * 0 + MASK)),
    "selects what is not likely": after(
        lambda step, selection: Selection(step.candidate, confidence=step.confidence - 9)
    ),
    "remasks": after(lambda step, selection: Selection(selection.commit, remask=step.candidate)),
    "replaces": after(lambda step, selection: Selection(selection.commit, replace=step.candidate)),
    "is done": after(lambda step, selection: Selection(selection.commit, done=step.candidate[:, 0])),
    "drafts": after(lambda step, selection: Selection(selection.commit, draft=step.token)),
    "waits": after(lambda step, selection: Selection(selection.commit & False, waits=True)),
    "names a list": fault("name_tokens", lambda context: [[1]]),
    "names far": fault("name_tokens", lambda context: context.position[..., None] + FAR),
    "adds a list": fault("bonus", lambda context: [[1]]),
    "adds what is not finite": fault(
        "bonus",
        lambda context: TokenBonus(
            context.position[..., None] * 0, torch.full((*context.position.shape, 1), torch.nan)
        ),
    ),
    "statistics number": type("Hostile", (Around,), {"statistics": 5})(),
    "top far": type("Hostile", (Around,), {"top": FAR})(),
    "chooses tokens maybe": type("Hostile", (Around,), {"chooses_tokens": "maybe"})(),
    "state raises": type("Hostile", (Around,), {"state": property(THROWN["exit"])})(),
    "state a number": type("Hostile", (Around,), {"state": {"steps": 5}})(),
    "incompatible by number": type("Hostile", (Around,), {"incompatibility": lambda *_: 5})(),
    "incompatible by raising": type("Hostile", (Around,), {"incompatibility": THROWN["exit"]})(),
    "incompatible at length": type("Hostile", (Around,), {"incompatibility": lambda *_: "x" * 10_000_000})(),
}


def beside_modified(modifier: Modifier) -> str | None:
    """Run a rule of ours with a modifier that is to fail among others, some of which have it around them too."""
    rule = get_sampler("threshold")
    try:
        bad = start(rule, 8, modifiers=[(modifier, modifier.Params(fault=True))])
        twins = modified(2, modifier)
    except (SamplerError, ParameterError) as error:
        return str(error)
    rows = [*others(None), *twins]
    *found, mine = events_of([*rows, bad], predictor())
    assert told(rows) == clean_modified()
    assert all(event.error is None for events in found for event in events)
    error = mine[-1].error
    assert error is not None or bad.finished
    return None if error is None else str(error)


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_that_fails_harms_neither_others_nor_its_like(name: str, away: ThreadPoolExecutor) -> None:
    message = away.submit(beside_modified, MODIFIERS[name]).result(30)
    assert message is not None and len(message) <= 700 and message.isprintable()
    assert message.startswith(f"modifier {NAME} failed: ") or name.startswith(
        ("sees token", "sees a token", "incompatible at")
    )


def overwriting(step: Step, *selection: Selection) -> Any:
    for each in selection:
        for value in vars(each).values():
            if isinstance(value, Tensor):
                value.fill_(True)
    overwrite(step)
    return Selection(torch.zeros(1, 4, dtype=torch.bool)) if selection else None


@pytest.mark.parametrize(
    "modifier",
    [
        fault("adjust", overwriting),
        fault("after", overwriting),
        fault("name_tokens", overwrite),
        fault("bonus", overwrite),
        adjusting(state=lambda step: {"seen": step.state["seen"] + torch.nan}),
        after(lambda step, selection: Selection(step.candidate & False)),
    ],
)
def test_what_a_modifier_may_try_changes_nothing_for_others(modifier: Modifier, away: ThreadPoolExecutor) -> None:
    assert away.submit(beside_modified, modifier).result(30) is None


@pytest.mark.parametrize(
    ("bind", "words"),
    [
        (THROWN["exit"], "sampler hostile failed: SystemExit"),
        (THROWN["long"], "sampler hostile failed: ValueError"),
        (lambda self, resources, params: 5, "sampler hostile failed: bind must return a sampler"),
        (lambda self, resources, params: resources.find("twin", "x"), "this server has no twin"),
        (lambda self, resources, params: resources.find("sampler", "nothing"), "unknown sampler 'nothing'"),
    ],
)
def test_a_sampler_that_cannot_be_bound_says_so(bind: Callable[..., Any], words: str) -> None:
    sampler = type("Hostile", (Leftmost,), {"requires": {"fault": "twin"}, "bind": bind})()
    with pytest.raises((SamplerError, ParameterError)) as caught:
        bound(sampler, sampler.Params())
    assert words in str(caught.value) and len(str(caught.value)) <= 700
