"""Response built from the choices of a request: whole or streamed."""

import time
import uuid
from abc import abstractmethod
from collections.abc import Sequence

from fastapi import Request, Response
from pydantic import BaseModel

from server.api.generation.choices import Choice, TextDelta, cancelling, follow
from server.api.generation.run import StartedChoices
from server.api.generation.streaming import Chunks, EventStreamResponse
from server.api.schemas.requests import GenerationBody, StreamOptions
from server.api.schemas.responses import ForwardPass, Usage, json_response
from server.api.serving import Serving
from server.engine import RequestError

LONG_ANSWER = 2000
"""Tokens from which on a response is assembled off the event loop."""


class Answer(Chunks):
    """Response in the format of one route.

    Attributes:
        id, created, model: common fields of the response and of each chunk.
    """

    prefix: str

    def __init__(self, started: StartedChoices, body: GenerationBody, serving: Serving) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = body.model or serving.model_names.name
        self.started = started
        self.body = body
        self._threads = serving.threads

    @abstractmethod
    def whole(self, pieces: Sequence[TextDelta]) -> BaseModel:
        """Complete response without streaming; one piece per choice."""

    @abstractmethod
    def usage_chunk(self) -> BaseModel:
        """Final chunk of a stream, with the usage."""

    def passes(self, piece: TextDelta) -> list[ForwardPass] | None:
        """Trajectory part of a piece; None unless requested."""
        return piece.passes if self.body.return_trajectory else None

    def usage_so_far(self, choice: Choice) -> Usage | None:
        """Usage so far, for each chunk of a choice; None unless requested."""
        return self.started.usage_of(choice) if self._options.continuous_usage_stats else None

    def last(self) -> Sequence[BaseModel]:
        return [self.usage_chunk()] if self._options.include_usage else []

    @property
    def _options(self) -> StreamOptions:
        return self.body.stream_options or StreamOptions()

    async def respond(self, request: Request) -> Response:
        """Run all choices to their end. Raises GenerationFailedError, ClientDisconnect."""
        choices = self.started.choices
        if self.body.stream:
            tells_usage = self._options.include_usage or self._options.continuous_usage_stats
            response: Response = EventStreamResponse(choices, self, exclude=set() if tells_usage else {"usage"})
            response.headers.update(self.started.headers)
            return response
        pieces: list[list[TextDelta]] = [[] for _ in choices]

        async def collect(choice: Choice, piece: TextDelta) -> None:
            pieces[choice.index].append(piece)

        with cancelling(choices):
            await follow(choices, request.receive, collect)

        def answer() -> Response:
            response = json_response(self.whole([_join(each) for each in pieces]))
            response.headers.update(self.started.headers)
            return response

        tokens = sum(choice.completion_tokens for choice in choices)
        return await self._threads.finish(answer) if tokens > LONG_ANSWER else answer()


def check_stream_options(body: GenerationBody) -> None:
    """Refuse stream options of a request that does not stream."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options", "stream_options is for streams only: set stream to true or leave it out")


def _join(pieces: Sequence[TextDelta]) -> TextDelta:
    return TextDelta(
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        passes=[each for piece in pieces for each in piece.passes],
        finish=pieces[-1].finish,
    )
