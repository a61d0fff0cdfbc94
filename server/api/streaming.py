"""Server-sent events."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import structlog
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.choices import Choice, Piece, cancelling, follow
from server.api.errors import ErrorResponse, GenerationFailedError, describe

log = structlog.get_logger(__name__)


class Chunks(ABC):
    """What a stream says."""

    @abstractmethod
    def first(self) -> Sequence[BaseModel]:
        """What it begins with."""

    @abstractmethod
    def chunk(self, choice: Choice, piece: Piece) -> BaseModel:
        """A piece of a choice."""

    @abstractmethod
    def last(self) -> Sequence[BaseModel]:
        """What it ends with, once all choices have ended."""


class EventStreamResponse(Response):
    """Sends each piece of each choice as soon as it is there.

    Args:
        choices: running generations; none outlives the response.
        chunks: how they are told.
        exclude: fields of chunks that are left out.
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

        async def write_event(event: BaseModel) -> None:
            # ASCII, because some readers of lines break them at U+2028 and the like.
            await write(f"data: {event.model_dump_json(ensure_ascii=True, exclude=self._exclude)}\n\n")

        async def consume(choice: Choice, piece: Piece) -> None:
            if piece != Piece():
                await write_event(self._chunks.chunk(choice, piece))

        with cancelling(self._choices):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for chunk in self._chunks.first():
                await write_event(chunk)
            try:
                await follow(self._choices, receive, consume)
            except ClientDisconnect:
                log.info("client gone", path=scope["path"])
                return
            except Exception as error:
                if not isinstance(error, GenerationFailedError):
                    log.exception("stream failed")
                await write_event(ErrorResponse(error=describe(error)[1]))
            else:
                for chunk in self._chunks.last():
                    await write_event(chunk)
                await write("data: [DONE]\n\n")
            await write("", more=False)
