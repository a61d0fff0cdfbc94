"""Event stream from the engine's thread to an event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

from samplers.loop.event import StepEvent
from server.engine.engine import Engine
from server.engine.generation import Generation
from server.engine.request import Event, Finished, FinishReason, GenerationRequest

MOST_EVENTS = 64
"""Maximum number of separate pending events; later ones are merged, unless the consumer wants each."""
MOST_NUMBERS = 250_000
"""Maximum count of numbers in pending events if the consumer wants each event."""
EVENT = 32
"""Fixed overhead of an event, in numbers."""


class EventStream:
    """Events of one generation, for one consumer on one event loop.

    The buffer is bounded. If the consumer lags behind, forward passes are merged into one event with their combined
    text. If the consumer wants every pass and lags too far behind, the generation is ended, like that of a slow reader.

    Args:
        every_pass: True if the consumer wants each pass.
    """

    def __init__(self, engine: Engine, every_pass: bool = True) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._every_pass = every_pass
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._merged: StepEvent | None = None
        self._numbers = 0
        self._overrun = False
        self._arrived = asyncio.Event()
        self._ended = False
        self.generation: Generation | None = None

    def deliver(self, event: Event) -> None:
        """Add an event. Called on the engine's thread."""
        with self._lock:
            if isinstance(event, StepEvent):
                self._keep(event)
            elif self._overrun:
                message = "the client took its answer too slowly for all forward passes to be kept for it"
                self._events.append(replace(event, reason=FinishReason.ABORT, message=message))
            else:
                self._events.append(event)
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:
            self._ended = True  # the loop is closed: there is no consumer left

    def _keep(self, event: StepEvent) -> None:
        if self._overrun:
            self.cancel()
            return
        if not self._every_pass and len(self._events) >= MOST_EVENTS:
            self._merge(event)
            return
        self._numbers += _numbers(event)
        if self._every_pass and self._numbers > MOST_NUMBERS:
            self._overrun = True
            self._engine.metrics.rejected("slow_reader")
            self._events.clear()
            self.cancel()
        else:
            self._events.append(event)

    def _merge(self, event: StepEvent) -> None:
        """Merge an event into the last pending one. Only the fields needed for the text are kept."""
        if self._merged is None or self._merged is not self._events[-1]:
            self._merged = StepEvent(event.forward, settled=event.settled)
            self._events.append(self._merged)
        merged = self._merged
        merged.positions.extend(event.positions)
        merged.confidences.extend(event.confidences)
        merged.text_tokens.extend(event.text_tokens)
        merged.forward, merged.settled = event.forward, event.settled

    def _take(self) -> Event | None:
        """The next event; None if there is none."""
        with self._lock:
            if not self._events:
                return None
            event = self._events.popleft()
            if event is self._merged:
                self._merged = None
            if isinstance(event, StepEvent):
                self._numbers -= _numbers(event)
            return event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self._ended:
            while (event := self._take()) is not None:
                self._ended = isinstance(event, Finished)
                yield event
            if self._ended:
                return
            self._arrived.clear()
            if not self._events:
                await self._arrived.wait()

    def cancel(self) -> None:
        """End the generation; its `Finished` event still arrives."""
        if self.generation is not None:
            self._engine.cancel(self.generation)


def _numbers(event: StepEvent) -> int:
    where = len(event.positions) + len(event.filled) + len(event.replaced) + len(event.remasked)
    return EVENT + where + len(event.tokens) + len(event.confidences) + len(event.text_tokens) + len(event.draft)


def submit_to(streams: list[EventStream], engine: Engine, requests: list[GenerationRequest]) -> None:
    """Submit generations, all or none, each with its stream (errors as in `Engine.submit`).

    Streams belong to their event loop's thread. This function may be called from any thread, since checking requests
    can take long.
    """
    generations = engine.submit_all(requests, [stream.deliver for stream in streams])
    for stream, generation in zip(streams, generations, strict=True):
        stream.generation = generation
