"""From the engine's thread to an event loop."""

import asyncio
from collections.abc import Iterator

import pytest

from server.engine import Engine, Finished, FinishReason, GenerationRequest, Limits, QueueFullError, StepEvent
from server.engine.stream import MOST_EVENTS, MOST_NUMBERS, EventStream, submit_to
from server.runtime.metrics import Metrics
from tests.engine.backends import CheapBackend, Gate
from tests.engine.test_engine import request, tokens_alone


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> Iterator[Engine]:
    engine = Engine(CheapBackend(before=gate), Metrics("test"), Limits(rows=4, queue=4))
    engine.start()
    yield engine
    gate.open()
    engine.stop()


def open_streams(engine: Engine, requests: list[GenerationRequest]) -> list[EventStream]:
    streams = [EventStream(engine) for _ in requests]
    submit_to(streams, engine, requests)
    return streams


@pytest.mark.asyncio
async def test_all_events_arrive_in_order(engine: Engine, gate: Gate) -> None:
    gate.open()
    streams = open_streams(engine, [request(0), request(1)])
    for i, stream in enumerate(streams):
        events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        commits = [event for event in events if isinstance(event, StepEvent)]
        assert [event.forward for event in commits] == list(range(1, len(commits) + 1))
        assert [token for event in commits for token in event.text_tokens] == tokens_alone(i)


@pytest.mark.asyncio
async def test_cancelling_ends_the_stream(engine: Engine, gate: Gate) -> None:
    (stream,) = open_streams(engine, [request(0, max_tokens=40)])
    await asyncio.to_thread(gate.step, 2)
    stream.cancel()
    gate.open()
    events = [event async for event in stream]
    assert isinstance(events[-1], Finished) and events[-1].reason is FinishReason.ABORT
    assert len(events) <= 4


def committed(forward: int, **numbers: list[int]) -> StepEvent:
    """A pass that committed one token, as its text."""
    return StepEvent(forward, [forward], [7], [0.5], [], forward, [forward], **numbers)


@pytest.mark.asyncio
async def test_what_waits_for_a_slow_consumer_is_merged_and_says_the_same_of_the_text(engine: Engine) -> None:
    stream = EventStream(engine, every_pass=False)
    count = 20 * MOST_EVENTS
    for forward in range(1, count + 1):
        stream.deliver(committed(forward, draft=[1] * 100))
    assert len(stream._events) <= MOST_EVENTS + 1
    stream.deliver(Finished(FinishReason.LENGTH, count, count))
    events = [event async for event in stream]
    commits = [event for event in events if isinstance(event, StepEvent)]
    for told in ("text_tokens", "positions"):
        assert [each for event in commits for each in getattr(event, told)] == list(range(1, count + 1))
    assert sum(len(event.confidences) for event in commits) == count
    assert (commits[-1].forward, commits[-1].settled) == (count, count)
    assert isinstance(events[-1], Finished) and events[-1].reason is FinishReason.LENGTH


@pytest.mark.asyncio
async def test_merging_ends_where_the_consumer_catches_up(engine: Engine) -> None:
    stream = EventStream(engine, every_pass=False)
    told: list[int] = []
    events = aiter(stream)
    for forward in range(1, 10 * MOST_EVENTS):
        stream.deliver(committed(forward))
        if forward % 3 == 0 and isinstance(event := await anext(events), StepEvent):
            told += event.text_tokens
    stream.deliver(Finished(FinishReason.LENGTH, forward, forward))
    told += [token async for event in events if isinstance(event, StepEvent) for token in event.text_tokens]
    assert told == list(range(1, 10 * MOST_EVENTS))


@pytest.mark.asyncio
async def test_where_each_pass_is_told_a_consumer_that_is_too_slow_ends_the_generation(
    engine: Engine, gate: Gate
) -> None:
    (stream,) = open_streams(engine, [request(0, max_tokens=40)])
    for forward in range(1, 1000):
        stream.deliver(committed(forward, draft=[1] * 1000))
        assert sum(len(event.draft) for event in stream._events if isinstance(event, StepEvent)) <= MOST_NUMBERS
    assert stream.generation is not None and stream.generation.cancelled
    gate.open()
    events = [event async for event in stream]
    assert len(events) == 1 and isinstance(events[0], Finished)
    assert events[0].reason is FinishReason.ABORT and "slowly" in events[0].message


@pytest.mark.asyncio
async def test_one_that_keeps_up_is_told_any_number_of_passes(engine: Engine) -> None:
    stream = EventStream(engine)
    events = aiter(stream)
    for forward in range(1, 1000):
        stream.deliver(committed(forward, draft=[1] * 1000))
        assert await anext(events) == committed(forward, draft=[1] * 1000)


@pytest.mark.asyncio
async def test_all_streams_open_or_none(engine: Engine) -> None:
    with pytest.raises(QueueFullError):
        open_streams(engine, [request(i) for i in range(5)])


def test_a_listener_whose_event_loop_is_gone_disturbs_nobody(engine: Engine, gate: Gate) -> None:
    async def leave() -> None:
        open_streams(engine, [request(0)])

    asyncio.run(leave())
    gate.open()
    assert engine.wait_idle(timeout=30)
    assert engine.alive
