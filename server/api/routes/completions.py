"""`/v1/completions`"""

from collections.abc import Sequence
from dataclasses import replace

from fastapi import FastAPI, Request, Response

from server.api.generation.answer import Answer, check_stream_options
from server.api.generation.assembly import escaped
from server.api.generation.choices import Choice, TextDelta
from server.api.generation.run import (
    EncodedPrompts,
    Reader,
    StartedChoices,
    check_ids,
    check_masks,
    refusing_long,
    start,
)
from server.api.schemas.bodies import read_body
from server.api.schemas.openapi import GENERATION_ERRORS, body_of, streamed
from server.api.schemas.requests import CompletionBody
from server.api.schemas.responses import Completion, CompletionChoice, CompletionLogprobs, EffectiveSettings, Usage
from server.api.serving import Serving
from server.engine import RequestError


def add_routes(app: FastAPI, serving: Serving) -> None:
    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=GENERATION_ERRORS | streamed(Completion),
        openapi_extra=body_of(CompletionBody),
        tags=["generation"],
    )
    async def completions(request: Request) -> Response:
        """Continue a prompt, or fill the gap between prompt and suffix."""
        owner = serving.owners.of(request)
        body = await read_body(serving.threads, owner, request, CompletionBody)
        check_stream_options(body)
        if body.echo and body.logprobs is not None:
            raise RequestError(
                "logprobs", "logprobs of the prompt, which echo asks for, are not supported: leave it out"
            )
        wants_logprobs = body.logprobs is not None
        size, count = len(await request.body()), len(body.prompts())
        started = await start(serving, body, owner, size, count, Reader(encode_prompts, encode_text), wants_logprobs)
        return await CompletionAnswer(started, body, serving).respond(request)


def encode_prompts(serving: Serving, body: CompletionBody) -> EncodedPrompts:
    """Encode prompts and suffix. Raises RequestError."""
    text, given, info = serving.text, body.prompts(), serving.engine.info
    around = body.add_special_tokens is not False
    most = info.max_length
    with refusing_long(serving, "prompt", body.max_tokens):
        for prompt in given:  # check all prompts before encoding any
            if isinstance(prompt, str):
                text.check_length(prompt, most)
        prompts = [text.encode(prompt, around) if isinstance(prompt, str) else prompt for prompt in given]
    with refusing_long(serving, "suffix", body.max_tokens):
        suffix = text.encode(body.suffix or "", most=most)
    for prompt in prompts:
        check_ids("prompt", prompt, info.vocab_size)
        check_masks(serving, "prompt", prompt)
    check_masks(serving, "suffix", suffix)
    echo = [p if isinstance(p, str) else text.decode(p, skip_special_tokens=False) for p in given if body.echo]
    return EncodedPrompts(prompts, suffix, body.max_tokens, prompt_field="prompt", echo=echo)


def encode_text(serving: Serving, body: CompletionBody, field: str, text: str) -> list[int]:
    """One more text as tokens, like the prompts. Raises RequestError."""
    with refusing_long(serving, field, body.max_tokens):
        return serving.text.encode(text, body.add_special_tokens is not False, serving.engine.info.max_length)


class CompletionAnswer(Answer):
    """Response in the format of OpenAI's completions, whose chunks have the format of the whole."""

    prefix = "cmpl"

    def __init__(self, started: StartedChoices, body: CompletionBody, serving: Serving) -> None:
        super().__init__(started, body, serving)
        self._wants_logprobs = body.logprobs is not None

    def first(self) -> Sequence[Completion]:
        if not self.started.prompts.echo:
            return []
        return [self._chunk(choice, TextDelta(self._echo(choice))) for choice in self.started.choices]

    def chunks(self, choice: Choice, piece: TextDelta) -> Sequence[Completion]:
        return [self._chunk(choice, piece)]

    def _chunk(self, choice: Choice, piece: TextDelta) -> Completion:
        used = self.started.used if piece.finish else None
        return self._completion([self._choice(choice, piece)], self.usage_so_far(choice), used)

    def usage_chunk(self) -> Completion:
        return self._completion([], usage=self.started.usage())

    def whole(self, pieces: Sequence[TextDelta]) -> Completion:
        choices = []
        for choice, piece in zip(self.started.choices, pieces, strict=True):
            choices.append(self._choice(choice, replace(piece, text=self._echo(choice) + piece.text)))
        return self._completion(choices, usage=self.started.usage(), unmask=self.started.used)

    def _echo(self, choice: Choice) -> str:
        echo = self.started.prompts.echo
        return echo[choice.prompt] if echo else ""

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None, unmask: EffectiveSettings | None = None
    ) -> Completion:
        return Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, unmask=unmask
        )

    def _choice(self, choice: Choice, piece: TextDelta) -> CompletionChoice:
        return CompletionChoice(
            index=choice.index,
            text=piece.text,
            logprobs=self._logprobs(piece) if self._wants_logprobs else None,
            finish_reason=piece.finish,
            trajectory=self.passes(piece),
        )

    def _logprobs(self, piece: TextDelta) -> CompletionLogprobs:
        return CompletionLogprobs(
            tokens=[
                f"bytes:{escaped(token.part.bytes)}" if token.part.text is None else token.part.text
                for token in piece.tokens
            ],
            token_logprobs=[token.logprob for token in piece.tokens],
            text_offset=[token.part.start for token in piece.tokens],
        )
