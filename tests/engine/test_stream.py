"""From the engine's thread to an event loop."""

import asyncio
from collections.abc import Iterator

import pytest

from server.engine import Committed, Engine, Finished, FinishReason, GenerationRequest, Limits, QueueFullError
from server.engine.stream import EventStream, submit_to
from server.metrics import Metrics
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
        commits = [event for event in events if isinstance(event, Committed)]
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
