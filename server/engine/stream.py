"""From the engine's thread to an event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from server.engine.engine import Engine
from server.engine.generation import Generation
from server.engine.request import Event, Finished, GenerationRequest


class EventStream:
    """The events of one generation, for one consumer on one event loop.

    What waits here is bounded: a generation has at most one event a token.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self.generation: Generation | None = None

    def deliver(self, event: Event) -> None:
        """Called on the engine's thread."""
        self._events.append(event)
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:
            self._ended = True  # the loop is closed: nobody listens any more

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self._ended:
            while self._events:
                event = self._events.popleft()
                self._ended = isinstance(event, Finished)
                yield event
            if self._ended:
                return
            self._arrived.clear()
            if not self._events:
                await self._arrived.wait()

    def cancel(self) -> None:
        """End the generation; its `Finished` event still comes."""
        if self.generation is not None:
            self._engine.cancel(self.generation)


def submit_to(streams: list[EventStream], engine: Engine, requests: list[GenerationRequest]) -> None:
    """Submit generations, all or none, each to its stream (errors as in `Engine.submit`).

    Streams belong to their event loop's thread; this may be called from any, since checking requests can take long.
    """
    generations = engine.submit_all(requests, [stream.deliver for stream in streams])
    for stream, generation in zip(streams, generations, strict=True):
        stream.generation = generation
