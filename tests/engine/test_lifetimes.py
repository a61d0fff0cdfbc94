"""Whatever way a generation ends, nothing of it stays in the resident batch."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from samplers import CacheMode
from samplers.loop import run as loop
from server.engine import Engine, FinishReason, Limits, Owner
from server.engine.generation import Generation
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Gate, Listener, run
from tests.engine.test_engine import Fatal, request


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> Iterator[Engine]:
    engine = Engine(CheapBackend(before=gate), Metrics("test"), Limits(rows=3))
    engine.start()
    yield engine
    gate.open()
    engine.stop()


def rows_there(engine: Engine) -> int:
    return sum(row is not None for row in engine._batch.rows)


def begin(engine: Engine, gate: Gate, count: int = 3) -> list[tuple[Generation, Listener]]:
    """Generations, up to three of which stand before their second forward, with tensors in the batch."""
    listeners = [Listener() for _ in range(count)]
    generations = engine.submit_all([request(i, max_tokens=30, timeout=60) for i in range(count)], list(listeners))
    gate.step()
    gate.wait()
    assert rows_there(engine) == min(count, 3)
    return list(zip(generations, listeners, strict=True))


def finish(engine: Engine, gate: Gate, reason: FinishReason, pairs: list[tuple[Generation, Listener]]) -> None:
    gate.open()
    for _, listener in pairs:
        assert listener.finish().reason is reason
    assert engine.wait_idle(timeout=30)
    assert rows_there(engine) == 0 and engine._batch.tokens.numel() == 0 and not engine._batch.groups
    for generation, _ in pairs:
        assert generation.row.batch is None and generation.row.plan.memory.content is None
        assert len(generation.row.canvas.tokens) > 30, "what there is stays readable"


def test_the_end(engine: Engine, gate: Gate) -> None:
    finish(engine, gate, FinishReason.LENGTH, begin(engine, gate, 5))


def test_cancelled_while_running_and_while_waiting(engine: Engine, gate: Gate) -> None:
    pairs = begin(engine, gate, 5)
    for generation, _ in pairs:
        engine.cancel(generation)
    finish(engine, gate, FinishReason.ABORT, pairs)


def test_out_of_time(engine: Engine, gate: Gate) -> None:
    pairs = begin(engine, gate, 5)
    for generation, _ in pairs:
        generation.submitted -= 61
    finish(engine, gate, FinishReason.TIMEOUT, pairs)


def test_a_forward_that_fails(engine: Engine, gate: Gate) -> None:
    pairs = begin(engine, gate)
    engine.backend._predict = None  # type: ignore[attr-defined]
    finish(engine, gate, FinishReason.ERROR, pairs)


def test_a_step_that_fails(engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited beside it goes on."""
    pairs = begin(engine, gate, 5)
    advance = loop.advance

    def faulty(*arguments: Any) -> Any:
        monkeypatch.setattr(loop, "advance", advance)
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(loop, "advance", faulty)
    gate.release()
    gate.wait()
    assert rows_there(engine) == 2
    assert [listener.finish().reason for _, listener in pairs[:3]] == [FinishReason.ERROR] * 3
    finish(engine, gate, FinishReason.LENGTH, pairs[3:])


def test_the_engines_own_end(engine: Engine, gate: Gate) -> None:
    pairs = begin(engine, gate, 5)
    engine.end_all()
    finish(engine, gate, FinishReason.ABORT, pairs)


def test_the_engines_death(engine: Engine, gate: Gate) -> None:
    pairs = begin(engine, gate, 5)
    engine.backend._predict = lambda query: (_ for _ in ()).throw(Fatal())  # type: ignore[attr-defined]
    finish(engine, gate, FinishReason.ERROR, pairs)


def test_set_aside_and_back_beside_others_of_other_lengths() -> None:
    """Tensors grow and slots change hands beneath generations that take no part in every step."""
    numbers = random.Random(0)
    lengths, caches = [1, 3, 40, 9], list(CacheMode)
    asked = [
        request(i % 8, max_tokens=numbers.choice(lengths), owner=Owner(f"{i % 3}"), cache=numbers.choice(caches))
        for i in range(60)
    ]
    together, alone = (Engine(CheapBackend(), Metrics("test"), Limits(rows=4, tokens=60)) for _ in range(2))
    for engine in (together, alone):
        engine.start()
    found = run(together, asked)
    slots = [len(listener.commits) for listener in found]
    assert max(slots) > 20
    for each, listener in zip(asked, found, strict=True):
        (expected,) = run(alone, [each])
        assert listener.tokens(each.max_tokens) == expected.tokens(each.max_tokens)
    for engine in (together, alone):
        assert engine.wait_idle(timeout=30) and rows_there(engine) == 0
        engine.stop()
