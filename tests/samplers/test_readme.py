"""The README's own samplers run as they stand there."""

import re
from pathlib import Path
from typing import Any

import pytest

from samplers import Canvas, Modifier, Sampler, get_sampler, list_modifiers, list_samplers
from samplers.loop.row import Row
from samplers.loop.run import finish
from samplers.registry import Description
from tests.samplers.models import MASK, VOCAB, events_of, predictor

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def written(name: str) -> Any:
    """A class of the README's, made."""
    section = README.partition("### Write your own sampler")[2].partition("\n## ")[0]
    for source in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        if f"class {name}(" in source:
            found: dict[str, Any] = {}
            exec(source, found)
            return found[name]()
    raise AssertionError(f"the README has no class {name}")


def row(sampler: Sampler, *modifiers: Modifier, **params: Any) -> Row:
    around = [(each, each.Params()) for each in modifiers]
    return Row(Canvas.blank([1], 24, MASK, 8), sampler, sampler.Params(**params), vocabulary=VOCAB, modifiers=around)


@pytest.mark.parametrize("params", [{}, {"threshold": 0.6, "relaxed_threshold": 0.3, "radius": 2}])
def test_the_plain_rule_is_local_leap(params: dict[str, Any]) -> None:
    mine, ours = row(written("Leap"), **params), row(get_sampler("local_leap"), **params)
    finish([mine, ours], predictor())
    assert mine.told == ours.told and mine.forwards == ours.forwards


def test_the_rule_with_a_state_revises_once() -> None:
    each = row(written("Wavering"))
    (events,) = events_of([each], predictor())
    assert all(event.error is None for event in events) and each.finished
    assert sum(bool(event.remasked) for event in events) == 1


def test_the_modifier_goes_around_any_rule() -> None:
    rule = get_sampler("topk")
    plain, doubting = events_of([row(rule), row(rule, written("Doubt"))], predictor())
    assert plain[0].confidences == doubting[0].confidences, "nothing is taken off where all is masked"
    assert doubting[1].confidences[0] == pytest.approx(plain[1].confidences[0] - 0.1 / 8)


@pytest.mark.parametrize("name", ["Leap", "Wavering", "Doubt"])
def test_they_describe_themselves(name: str) -> None:
    assert Description.of(written(name)).summary.endswith(".")


def test_all_that_there_are_are_listed() -> None:
    for each in [*list_samplers(), *list_modifiers()]:
        assert re.search(rf"^\| `{each.name}` \| .* \|$", README, re.MULTILINE), each.name
