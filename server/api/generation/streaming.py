"""Server-sent events."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import structlog
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.errors import ErrorResponse, GenerationFailedError, describe
from server.api.generation.choices import Choice, TextDelta, cancelling, follow

log = structlog.get_logger(__name__)


class Chunks(ABC):
    """Events of a stream in the format of one route."""

    @abstractmethod
    def first(self) -> Sequence[BaseModel]:
        """Events before the first forward pass."""

    @abstractmethod
    def chunks(self, choice: Choice, piece: TextDelta) -> Sequence[BaseModel]:
        """Events for a piece of a choice."""

    @abstractmethod
    def last(self) -> Sequence[BaseModel]:
        """Events after all choices have ended."""


class EventStreamResponse(Response):
    """Sends each piece of each choice as soon as it is final.

    Args:
        choices: running generations, cancelled when the response ends.
        chunks: converts pieces to events.
        exclude: fields left out of the chunks.
    """

    media_type = "text/event-stream"

    def __init__(self, choices: Sequence[Choice], chunks: Chunks, exclude: set[str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._choices = choices
        self._chunks = chunks
        self._exclude = exclude

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": more})

        async def write_events(events: Sequence[BaseModel]) -> None:
            # ASCII, because some line readers also break lines at U+2028 and similar characters.
            texts = [event.model_dump_json(ensure_ascii=True, exclude=self._exclude) for event in events]
            if texts:
                await write("".join(f"data: {text}\n\n" for text in texts))

        async def consume(choice: Choice, piece: TextDelta) -> None:
            if piece != TextDelta():
                await write_events(self._chunks.chunks(choice, piece))

        with cancelling(self._choices):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await write_events(self._chunks.first())
            try:
                await follow(self._choices, receive, consume)
            except ClientDisconnect:
                log.info("client gone", path=scope["path"][:200])
                return
            except Exception as error:
                if not isinstance(error, GenerationFailedError):
                    log.exception("stream failed")
                await write_events([ErrorResponse(error=describe(error)[1])])
            else:
                await write_events(self._chunks.last())
                await write("data: [DONE]\n\n")
            await write("", more=False)
