"""`/tokenize` and `/detokenize`, in vLLM's formats."""

from functools import partial

from fastapi import FastAPI, Request, Response

from server.api.generation.run import check_ids
from server.api.routes.chat import encode_chat
from server.api.schemas.bodies import read_body
from server.api.schemas.openapi import BODY_ERRORS, body_of
from server.api.schemas.requests import DetokenizeBody, TokenizeBody
from server.api.schemas.responses import Detokenized, Tokens, json_response
from server.api.serving import Serving
from server.api.text_threads import Work
from server.engine import RequestError
from server.engine.engine import CONTEXT_LENGTH_EXCEEDED
from server.models.text.codec import TextTooLongError

MAX_COUNTED = 2 << 20
"""Bytes of the largest body whose text is tokenized even if it cannot fit the context."""


def add_routes(app: FastAPI, serving: Serving) -> None:
    @app.post(
        "/tokenize",
        response_model=Tokens,
        responses=BODY_ERRORS,
        openapi_extra=body_of(TokenizeBody),
        tags=["tokens"],
    )
    async def tokenize(request: Request) -> Response:
        """The tokens of a prompt or a chat, as a completion would use them."""
        owner = serving.owners.of(request)
        body = await read_body(serving.threads, owner, request, TokenizeBody)
        serving.model_names.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("prompt", "send either prompt or messages")
        if body.messages is None and body.add_generation_prompt is not None:
            raise RequestError("add_generation_prompt", "add_generation_prompt is for messages: leave it out")
        size = len(await request.body())
        kind = Work.TEXT if body.messages is None else Work.CHAT
        return await serving.threads.run(partial(_tokenized, serving, body, size > MAX_COUNTED), owner, size, kind)

    @app.post(
        "/detokenize",
        response_model=Detokenized,
        responses=BODY_ERRORS,
        openapi_extra=body_of(DetokenizeBody),
        tags=["tokens"],
    )
    async def detokenize(request: Request) -> Response:
        """The text of tokens, special ones included."""
        owner = serving.owners.of(request)
        body = await read_body(serving.threads, owner, request, DetokenizeBody)
        serving.model_names.check_model(body.model)
        size = len(await request.body())
        return await serving.threads.run(partial(_detokenized, serving, body), owner, size)


def _tokenized(serving: Serving, body: TokenizeBody, is_long: bool) -> Response:
    """Tokens of a body; a long text only if it can fit the context. Raises RequestError."""
    try:
        tokens = _encode(serving, body, serving.engine.info.max_length if is_long else None)
    except TextTooLongError as error:
        field = "prompt" if body.messages is None else "messages"
        message = (
            f"{field}: at least {error.at_least} tokens, far more than the context's {serving.engine.info.max_length}: "
            f"beyond that, only bodies of at most {MAX_COUNTED} bytes are tokenized ({CONTEXT_LENGTH_EXCEEDED})"
        )
        raise RequestError(field, message, CONTEXT_LENGTH_EXCEEDED) from None
    strings = [serving.text.token_name(token) for token in tokens] if body.return_token_strs else None
    limit = serving.engine.info.max_length
    # Skip validation of our own tokens: millions of them would hold the interpreter lock.
    return json_response(
        Tokens.model_construct(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=strings)
    )


def _detokenized(serving: Serving, body: DetokenizeBody) -> Response:
    check_ids("tokens", body.tokens, serving.engine.info.vocab_size)
    return json_response(Detokenized(prompt=serving.text.decode(body.tokens, skip_special_tokens=False)))


def _encode(serving: Serving, body: TokenizeBody, most: int | None) -> list[int]:
    serving.engine.check_accepting()
    if body.messages is not None:
        around, prompted = bool(body.add_special_tokens), body.add_generation_prompt is not False
        return encode_chat(serving.text, body.messages, around, prompted, most)
    return serving.text.encode(body.prompt or "", body.add_special_tokens is not False, most)
