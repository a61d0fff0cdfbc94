"""Generations that are several canvases, as views or as particles, in the queue, in a forward and at their end."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from samplers import CacheMode, get_modifier, get_sampler
from samplers.forward.query import Query
from samplers.resources import DEFAULT, bound
from server.engine import Engine, Event, FinishReason, GenerationRequest, Limits, Owner, RequestError
from server.engine import engine as engine_module
from server.engine.generation import Generation
from server.engine.scheduler import Scheduler
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Gate, Listener, run
from tests.engine.test_engine import request, value

SMC, GUIDANCE = get_sampler("smc"), get_modifier("guidance")


def particles(number: int, count: int = 4, **changes: Any) -> GenerationRequest:
    """One that is denoised on so many canvases."""
    params = SMC.Params(particles=count)
    rule = bound(SMC, params, DEFAULT)
    asked = request(number, "topk", **({"params": params, "block_length": 4} | changes))
    return replace(asked, sampler=rule, name="smc")


def guided(number: int, **changes: Any) -> GenerationRequest:
    return request(number, "topk", modifiers=[(GUIDANCE, GUIDANCE.Params(scale=0.5))], **changes)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> Iterator[Engine]:
    engine = Engine(CheapBackend(before=gate), Metrics("test"), Limits(rows=8))
    engine.start()
    yield engine
    gate.open()
    engine.stop()


def test_every_canvas_takes_a_row_of_a_forward_and_counts_as_one(engine: Engine, gate: Gate) -> None:
    gate.open()
    asked = [particles(0), guided(1), guided(2), request(3), particles(4), request(5)]
    listeners = run(engine, asked)
    assert all(listener.finish().reason is FinishReason.LENGTH for listener in listeners)
    backend = engine.backend
    assert isinstance(backend, CheapBackend)
    assert 4 < max(len(batch) for batch in backend.batches) <= 8
    forwards = sum(listener.finish().forwards for listener in listeners)
    assert forwards == sum(len(batch) for batch in backend.batches)
    for name in {each.name for each in asked}:
        mine = sum(end.finish().forwards for each, end in zip(asked, listeners, strict=True) if each.name == name)
        assert value(engine, "dllm_forward_passes_total", sampler=name) == mine
        tokens = sum(each.max_tokens for each in asked if each.name == name)
        assert value(engine, "dllm_committed_tokens_per_step_sum", sampler=name) == tokens
    for each, listener in zip(asked, listeners, strict=True):
        (alone,) = run(engine, [each])
        assert (alone.text(), alone.finish().forwards) == (listener.text(), listener.finish().forwards)
        assert len(listener.text()) == listener.finish().completion_tokens == each.max_tokens
    assert not any(engine._batch.rows)


@pytest.mark.parametrize(
    ("asked", "field"),
    [(particles(0, 9), "sampler_params"), (particles(0, 5, modifiers=guided(0).modifiers), "sampler_params")],
)
def test_more_canvases_than_a_forward_takes_are_refused(engine: Engine, asked: GenerationRequest, field: str) -> None:
    with pytest.raises(RequestError, match=r"takes at most 8 \(--max-batch\)") as refused:
        engine.submit(asked, Listener())
    assert refused.value.field == field


def test_canvases_that_are_too_long_together_are_refused() -> None:
    engine = Engine(CheapBackend(), Metrics("test"), Limits(rows=8, tokens=64))
    message = r"2 canvases of 70 tokens in all, and takes at most 8 \(--max-batch\) of 64"
    with pytest.raises(RequestError, match=message) as refused:
        engine.check(guided(0, max_tokens=34))
    assert refused.value.field == "modifiers"


def test_one_of_several_canvases_is_not_passed_by_single_ones_for_ever() -> None:
    """Caches of as many canvases as may have one; whenever one ends, another single one waits already."""
    check = Engine(CheapBackend(), Metrics("test"), Limits(rows=4)).check

    def generation(asked: GenerationRequest) -> Generation:
        return Generation(asked, lambda event: None, *check(asked))

    cached: dict[str, Any] = {"cache": CacheMode.DUAL, "block_length": 4, "max_tokens": 8}
    made = Scheduler(Limits(rows=4, tokens=64))
    singles = [generation(request(i, "topk", owner=Owner(f"{i}", f"{i}"), **cached)) for i in range(5)]
    made.add(singles)
    made.pick()
    many = generation(particles(0, owner=Owner("many", "many"), **cached))
    made.add([many])
    for turn in range(300):
        if many in made.pick():
            break
        made.add([generation(request(0, "topk", owner=Owner(f"late {turn}", f"late {turn}"), **cached))])
        singles.append(made.all()[-1])
        oldest = next(each for each in singles if each.begun is not None)
        singles.remove(oldest)
        made.remove(oldest)
    assert turn < 200


def test_a_failed_forward_is_told_once(engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    said = structlog.testing.LogCapture()
    kind = structlog.make_filtering_bound_logger(0)
    monkeypatch.setattr(engine_module, "log", structlog.wrap_logger(None, processors=[said], wrapper_class=kind))

    def before(query: Query) -> None:
        if any(canvas.tokens[0] == 1 for canvas in query.canvases):
            raise RuntimeError("device-side assert")

    engine.backend._before = before  # type: ignore[attr-defined]
    broken, other = run(engine, [particles(0), guided(1)])
    assert broken.finish().message == "the forward pass failed: RuntimeError" and broken.commits == []
    assert other.finish().reason is FinishReason.LENGTH
    (line,) = said.entries
    assert (line["event"], line["error"]) == ("forward pass failed", "RuntimeError('device-side assert')")
    assert not any(engine._batch.rows)


def test_a_listener_that_fails_at_the_first_of_several_events(engine: Engine, gate: Gate) -> None:
    gate.open()

    def deaf(event: Event) -> None:
        raise RuntimeError("the loop is closed")

    other = Listener()
    engine.submit_all([particles(0), particles(1)], [deaf, other])
    assert other.finish().reason is FinishReason.LENGTH
    assert engine.wait_idle(timeout=30) and engine.alive
    assert not any(engine._batch.rows)
