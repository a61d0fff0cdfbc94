"""`/v1/chat/completions`"""

from collections.abc import Sequence

from fastapi import FastAPI, Request, Response

from server.api.generation.answer import Answer, check_stream_options
from server.api.generation.assembly import escaped
from server.api.generation.choices import Choice, TextDelta, Token
from server.api.generation.run import EncodedPrompts, Reader, StartedChoices, check_masks, refusing_long, start
from server.api.schemas.bodies import read_body
from server.api.schemas.openapi import GENERATION_ERRORS, body_of, streamed
from server.api.schemas.requests import ChatBody, Message
from server.api.schemas.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    EffectiveSettings,
    TokenLogprob,
    Usage,
)
from server.api.serving import Serving
from server.engine import FinishReason, RequestError
from server.models.text.codec import ChatTemplateError, TextCodec


def add_routes(app: FastAPI, serving: Serving) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=GENERATION_ERRORS | streamed(ChatChunk),
        openapi_extra=body_of(ChatBody),
        tags=["generation"],
    )
    async def chat_completions(request: Request) -> Response:
        """Write the next message of a chat."""
        owner = serving.owners.of(request)
        body = await read_body(serving.threads, owner, request, ChatBody)
        check_stream_options(body)
        size = len(await request.body())
        started = await start(serving, body, owner, size, 1, Reader(encode_prompts, encode_text), bool(body.logprobs))
        return await ChatAnswer(started, body, serving).respond(request)


def encode_prompts(serving: Serving, body: ChatBody) -> EncodedPrompts:
    """Encode the chat. Raises RequestError."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        message = f"max_tokens says {older}, but max_completion_tokens says {newer}: send one of them"
        raise RequestError("max_tokens", message, "conflicting_values")
    field = "max_tokens" if newer is None else "max_completion_tokens"
    with refusing_long(serving, "messages", newer or older):
        most = serving.engine.info.max_length
        prompt = encode_chat(serving.text, body.messages, bool(body.add_special_tokens), most=most)
    check_masks(serving, "messages", prompt)
    return EncodedPrompts([prompt], [], newer or older, prompt_field="messages", length_field=field)


def encode_text(serving: Serving, body: ChatBody, field: str, text: str) -> list[int]:
    """One more text as tokens: the only message of a chat, a user's. Raises RequestError."""
    messages = [Message(role="user", content=text)]
    with refusing_long(serving, field, body.max_completion_tokens or body.max_tokens):
        around, most = bool(body.add_special_tokens), serving.engine.info.max_length
        return encode_chat(serving.text, messages, around, most=most, field=field)


def encode_chat(
    text: TextCodec,
    messages: Sequence[Message],
    add_special_tokens: bool = False,
    add_generation_prompt: bool = True,
    most: int | None = None,
    field: str = "messages",
) -> list[int]:
    """Token ids of messages. Raises RequestError, and TextTooLongError like `TextCodec.encode_chat`."""
    chat = [message.for_template() for message in messages]
    try:
        return text.encode_chat(chat, add_generation_prompt, add_special_tokens, most)
    except ChatTemplateError as error:
        raise RequestError(field, str(error)) from None


class ChatAnswer(Answer):
    """Response in the format of OpenAI's chat completions."""

    prefix = "chatcmpl"

    def __init__(self, started: StartedChoices, body: ChatBody, serving: Serving) -> None:
        super().__init__(started, body, serving)
        self._wants_logprobs = bool(body.logprobs)
        self._begun: set[int] = set()

    def first(self) -> Sequence[ChatChunk]:
        # Clients measure the time to first token by the first chunk, so the role is sent along with the first text.
        return []

    def chunks(self, choice: Choice, piece: TextDelta) -> Sequence[ChatChunk]:
        chunk = self._piece(choice, piece)
        if choice.index in self._begun:
            return [chunk]
        self._begun.add(choice.index)
        role = ChatChunkChoice(index=choice.index, delta=ChatDelta(role="assistant", content=""))
        return [self._chunk([role], self.usage_so_far(choice)), chunk]

    def _piece(self, choice: Choice, piece: TextDelta) -> ChatChunk:
        part = ChatChunkChoice(
            index=choice.index,
            delta=ChatDelta(content=piece.text or None),
            logprobs=self._logprobs(piece.tokens),
            finish_reason=piece.finish,
            trajectory=self.passes(piece),
        )
        return self._chunk([part], self.usage_so_far(choice), self.started.used if piece.finish else None)

    def usage_chunk(self) -> ChatChunk:
        return self._chunk([], usage=self.started.usage())

    def whole(self, pieces: Sequence[TextDelta]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=i,
                message=ChatMessage(content=piece.text),
                logprobs=self._logprobs(piece.tokens),
                finish_reason=piece.finish or FinishReason.LENGTH,
                trajectory=self.passes(piece),
            )
            for i, piece in enumerate(pieces)
        ]
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=self.started.usage(),
            unmask=self.started.used,
        )

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None, unmask: EffectiveSettings | None = None
    ) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, unmask=unmask
        )

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        return ChatLogprobs(content=[self._logprob(token) for token in tokens]) if self._wants_logprobs else None

    def _logprob(self, token: Token) -> TokenLogprob:
        part = token.part
        text = escaped(part.bytes) if part.text is None else part.text
        return TokenLogprob(token=text, logprob=token.logprob, bytes=list(part.bytes))
