"""A generation as one choice of an answer: its events become pieces of text."""

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

NO_CHANCE = -9999.0
"""The log probability that stands for one which is too low to tell."""


@dataclass(frozen=True)
class Token:
    """A token of the text, and the log probability that it was committed with."""

    part: TokenText
    logprob: float


@dataclass(frozen=True)
class TextDelta:
    """What became certain of a choice. `tokens` and `passes` are there where they were asked for."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    passes: list[ForwardPass] = field(default_factory=list)
    finish: Finish | None = None


class Choice:
    """Follows one generation.

    Args:
        index: place in the answer.
        prompt: which of the request's prompts it continues.
        stops: texts before which it ends.
        logprobs, trajectory: whether to tell tokens and forward passes too.
        several: whether the generation has several canvases, whose passes commit nothing until one has won.

    Attributes:
        completion_tokens, forwards: what the engine has counted so far.
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
        self._tokens: list[Token] = []  # whose text has not been told yet
        self._positions = 0  # tokens whose text is known
        self._told = 0  # characters that were told

    def cancel(self) -> None:
        """End the generation, if it has not ended."""
        self._stream.cancel()

    async def pieces(self) -> AsyncIterator[TextDelta]:
        """What becomes certain, as it does. Raises GenerationFailedError."""
        async for event in self._stream:
            yield self._finished(event) if isinstance(event, Finished) else self._committed(event)

    def _committed(self, event: StepEvent) -> TextDelta:
        self.completion_tokens, self.forwards = event.settled, event.forward
        passes = [self._pass(event)] if self._trajectory and (event.positions or not self._several) else []
        text = self._stops.add(self._decode(event))
        return TextDelta(text, self._tell(text), passes)

    def _finished(self, event: Finished) -> TextDelta:
        self.completion_tokens, self.forwards = event.completion_tokens, event.forwards
        if self._logprobs:
            self._know(self._texts.add([], last=True))
        text = self._stops.add(self._detokenizer.add([], last=True), last=True)
        if self._stops.stopped:
            return TextDelta(text, self._tell(text), finish=FinishReason.STOP)
        if event.reason is not FinishReason.STOP and event.reason is not FinishReason.LENGTH:
            raise failure(event.reason, event.message)
        return TextDelta(text, self._tell(text, last=True), finish=event.reason)

    def _decode(self, event: StepEvent) -> str:
        if self._logprobs:
            for position, confidence in zip(event.positions, event.confidences, strict=True):
                self._logs[position] = math.log(confidence) if confidence > 0 else NO_CHANCE
            self._know(self._texts.add(event.text_tokens))
        return self._detokenizer.add(event.text_tokens)

    def _know(self, parts: Sequence[TokenText]) -> None:
        for part in parts:
            self._tokens.append(Token(part, self._logs[self._positions]))
            self._positions += 1

    def _tell(self, text: str, last: bool = False) -> list[Token]:
        """The tokens that begin in the text that is told now; at the end also those without a text."""
        self._told += len(text)
        told = [token for token in self._tokens if last or token.part.start < self._told]
        self._tokens = self._tokens[len(told) :]
        return told

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
    """Whatever happens inside: no generation outlives it."""
    try:
        yield
    finally:
        for choice in choices:
            choice.cancel()


async def follow(
    choices: Sequence[Choice], receive: Receive, consume: Callable[[Choice, TextDelta], Awaitable[None]]
) -> None:
    """Hand over the pieces of all choices as they come.

    Raises GenerationFailedError when one of them fails, ClientDisconnect when the client goes.
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
