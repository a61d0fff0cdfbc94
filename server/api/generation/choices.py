"""A choice of a response: turns the events of one generation into pieces of text."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.api.errors import GenerationFailedError, failure
from server.api.generation.assembly import Detokenizer, StopStrings, TokenText, TokenTexts
from server.api.schemas.responses import Finish, ForwardPass
from server.engine import Finished, FinishReason, StepEvent
from server.engine.stream import EventStream
from server.models.text.codec import TextCodec

MIN_LOGPROB = -9999.0
"""Log probability reported in place of values that are too low."""


@dataclass(frozen=True)
class Token:
    """A token of the text with the log probability it was committed with."""

    part: TokenText
    logprob: float


@dataclass(frozen=True)
class TextDelta:
    """New final output of a choice. `tokens` and `passes` are set if requested."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    passes: list[ForwardPass] = field(default_factory=list)
    finish: Finish | None = None


class Choice:
    """Output of one generation.

    Args:
        index: place in the answer.
        prompt: which of the request's prompts it continues.
        stops: texts before which it ends.
        logprobs, trajectory: whether to tell tokens and forward passes too.
        several: whether the generation has several canvases, whose passes commit nothing until one has won.

    Attributes:
        completion_tokens, forwards: the engine's counts so far.
    """

    def __init__(
        self,
        stream: EventStream,
        codec: TextCodec,
        index: int,
        prompt: int,
        stops: Sequence[str] = (),
        logprobs: bool = False,
        trajectory: bool = False,
        several: bool = False,
    ) -> None:
        self.index = index
        self.prompt = prompt
        self.completion_tokens = 0
        self.forwards = 0
        self._stream = stream
        self._codec = codec
        self._detokenizer = Detokenizer(codec)
        self._texts = TokenTexts(codec)
        self._stops = StopStrings(stops)
        self._logprobs = logprobs
        self._trajectory = trajectory
        self._several = several
        self._logs: dict[int, float] = {}  # by position
        self._tokens: list[Token] = []  # tokens whose text is not reported yet
        self._positions = 0  # tokens with known text
        self._reported = 0  # characters reported

    def cancel(self) -> None:
        """Cancel the generation, if it still runs."""
        self._stream.cancel()

    async def pieces(self) -> AsyncIterator[TextDelta]:
        """Yield pieces as they become final. Raises GenerationFailedError."""
        async for event in self._stream:
            yield self._finished(event) if isinstance(event, Finished) else self._committed(event)

    def _committed(self, event: StepEvent) -> TextDelta:
        self.completion_tokens, self.forwards = event.settled, event.forward
        passes = [self._pass(event)] if self._trajectory and (event.positions or not self._several) else []
        text = self._stops.add(self._decode(event))
        return TextDelta(text, self._take_tokens(text), passes)

    def _finished(self, event: Finished) -> TextDelta:
        self.completion_tokens, self.forwards = event.completion_tokens, event.forwards
        if self._logprobs:
            self._add_tokens(self._texts.add([], last=True))
        text = self._stops.add(self._detokenizer.add([], last=True), last=True)
        if self._stops.stopped:
            return TextDelta(text, self._take_tokens(text), finish=FinishReason.STOP)
        if event.reason is not FinishReason.STOP and event.reason is not FinishReason.LENGTH:
            raise failure(event.reason, event.message)
        return TextDelta(text, self._take_tokens(text, last=True), finish=event.reason)

    def _decode(self, event: StepEvent) -> str:
        if self._logprobs:
            for position, confidence in zip(event.positions, event.confidences, strict=True):
                self._logs[position] = math.log(confidence) if confidence > 0 else MIN_LOGPROB
            self._add_tokens(self._texts.add(event.text_tokens))
        return self._detokenizer.add(event.text_tokens)

    def _add_tokens(self, parts: Sequence[TokenText]) -> None:
        for part in parts:
            self._tokens.append(Token(part, self._logs[self._positions]))
            self._positions += 1

    def _take_tokens(self, text: str, last: bool = False) -> list[Token]:
        """Tokens that begin in the newly reported text; at the end also those without text."""
        self._reported += len(text)
        taken = [token for token in self._tokens if last or token.part.start < self._reported]
        self._tokens = self._tokens[len(taken) :]
        return taken

    def _pass(self, event: StepEvent) -> ForwardPass:
        return ForwardPass(
            forward=event.forward,
            positions=event.positions,
            tokens=event.tokens,
            token_texts=[self._codec.token(token) for token in event.tokens],
            confidences=event.confidences,
            filled=event.filled,
            replaced=event.replaced,
            remasked=event.remasked,
            draft=event.draft,
            draft_texts=[self._codec.token(token) for token in event.draft],
        )


@contextmanager
def cancelling(choices: Sequence[Choice]) -> Iterator[None]:
    """Cancel all generations when the block is left, by an exception or otherwise."""
    try:
        yield
    finally:
        for choice in choices:
            choice.cancel()


async def follow(
    choices: Sequence[Choice], receive: Receive, consume: Callable[[Choice, TextDelta], Awaitable[None]]
) -> None:
    """Pass the pieces of all choices to `consume` as they come.

    Raises GenerationFailedError if a choice fails, ClientDisconnect if the client disconnects.
    """
    ended: list[Exception] = []
    async with anyio.create_task_group() as watching:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.append(ClientDisconnect())
            watching.cancel_scope.cancel()

        async def work(choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    await consume(choice, piece)
            except GenerationFailedError as error:
                ended.append(error)
                watching.cancel_scope.cancel()

        watching.start_soon(watch)
        async with anyio.create_task_group() as working:
            for choice in choices:
                working.start_soon(work, choice)
        watching.cancel_scope.cancel()
    if ended:
        raise ended[0]
