"""Rows that share a batch, whoever comes, waits, comes back or goes: each gets what it gets alone."""

from dataclasses import asdict
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import AttentionPattern, CacheMode, Canvas, TokenChoice, get_sampler
from samplers.loop.batch import Batch
from samplers.loop.row import Row
from samplers.loop.run import run
from tests.samplers.models import MASK, VOCAB, predictor

RULES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("topk", {"k": 2}),
    ("threshold", {"threshold": 0.4}),
    ("random", {}),
    ("dream", {"alg_temp": 0.5}),
    ("entropy_bound", {"gamma": 3.0}),
    ("edit", {"threshold": 0.4, "edit_threshold": 0.2}),
    ("credit", {}),  # keeps lists that grow, per position
    ("saber", {}),  # keeps numbers per row and position
)
PATTERNS = (AttentionPattern(), AttentionPattern(shifted=True), AttentionPattern(causal_block=4, judges_drawn=True))
predict = predictor()


@st.composite
def generations(draw: st.DrawFn) -> dict[str, Any]:
    name, params = draw(st.sampled_from(RULES))
    pattern = draw(st.sampled_from(PATTERNS))
    sampled = not get_sampler(name).chooses_tokens and name != "credit" and draw(st.booleans())
    return {
        "prompt": draw(st.lists(st.integers(1, VOCAB - 1), max_size=5)),
        "length": draw(st.integers(1, 12)),
        "block": 4 if pattern.causal else draw(st.sampled_from([None, 3, 4])),
        "pattern": pattern,
        "name": name,
        "params": params,
        "choice": TokenChoice(0.9) if sampled else TokenChoice(),
        "seed": draw(st.integers(0, 1000)),
        "ends": draw(st.frozensets(st.integers(1, VOCAB - 1), max_size=2)),
        "fill": draw(st.booleans()),
        "cache": draw(st.sampled_from([CacheMode.NONE, CacheMode.PREFIX])),
    }


def row_of(spec: dict[str, Any]) -> Row:
    rule = get_sampler(spec["name"])
    canvas = Canvas.blank(spec["prompt"], spec["length"], MASK, spec["block"], None, spec["pattern"])
    return Row(
        canvas,
        rule,
        rule.Params(**spec["params"]),
        spec["choice"],
        spec["seed"],
        spec["ends"],
        spec["fill"],
        spec["cache"],
        VOCAB,
    )


def result(row: Row, events: list[Any]) -> tuple[Any, ...]:
    told = []
    for event in events:
        assert event.error is None, event.error
        told.append(asdict(event) | {"confidences": [round(each, 5) for each in event.confidences]})
    return row.canvas.tokens.tolist(), row.told, row.forwards, row.end, told


def alone(spec: dict[str, Any]) -> tuple[Any, ...]:
    row = row_of(spec)
    return result(row, [event for turn in run([row], predict) for _, event in turn])


@settings(max_examples=20)
@given(st.lists(generations(), min_size=1, max_size=5), st.data())
def test_a_row_is_the_same_alone_and_with_any_neighbours_and_schedule(specs: list[dict[str, Any]], data: Any) -> None:
    batch = Batch()
    waiting = list(range(len(specs)))
    there: dict[int, Row] = {}
    events: dict[int, list[Any]] = {i: [] for i in waiting}
    found: dict[int, tuple[Any, ...]] = {}

    def take() -> list[Row]:
        for i in [i for i, row in there.items() if row.finished]:
            if data.draw(st.booleans()):
                leave(i)
        while waiting and (data.draw(st.booleans()) or all(row.finished for row in there.values())):
            i = waiting.pop()
            there[i] = row_of(specs[i])
        going = [i for i, row in there.items() if not row.finished]
        some = [i for i in going if data.draw(st.booleans())] or going[:1]
        return [there[i] for i in data.draw(st.permutations(some))]

    def leave(i: int) -> None:
        row = there.pop(i)
        row.release()
        found[i] = result(row, events[i])

    for turn in run(take, predict, batch=batch):
        for row, event in turn:
            (i,) = (i for i, each in there.items() if each is row)
            events[i].append(event)
    for i in data.draw(st.permutations(list(there))):
        leave(i)
    assert found == {i: alone(spec) for i, spec in enumerate(specs)}
    assert not any(batch.rows) and not batch.groups
