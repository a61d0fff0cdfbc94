"""Response bodies in OpenAI's formats. Our additions: `unmask`, `trajectory`, and the details of `usage`."""

from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from server.engine import FinishReason

PIECE = 64 << 10
"""Bytes of a long response that are sent at a time."""

Finish = Literal[FinishReason.STOP, FinishReason.LENGTH]


def _absent(value: object) -> bool:
    """True for the value of a field that is omitted when it has none."""
    return value is None


def _empty(value: object) -> bool:
    return value == []


class UsageDetails(BaseModel):
    """What diffusion adds to a usage."""

    forward_passes: int = Field(description="Forward passes, counted for every choice that took part.")
    tokens_per_forward: float = Field(description="Completion tokens / forward passes.")


class Usage(BaseModel):
    """Prompt tokens count once however many choices there are; completion tokens include the end-of-text."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: UsageDetails

    @classmethod
    def of(cls, prompt: int, completion: int, forwards: int) -> "Usage":
        details = UsageDetails(forward_passes=forwards, tokens_per_forward=completion / forwards if forwards else 0.0)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            completion_tokens_details=details,
        )


class EffectiveModifier(BaseModel):
    """A modifier that was around the sampler."""

    name: str
    params: dict[str, Any]


class EffectiveSettings(BaseModel):
    """How the answer was made, defaults filled in."""

    sampler: str
    sampler_params: dict[str, Any]
    modifiers: list[EffectiveModifier] = Field([], exclude_if=_empty, description="What was around the sampler.")
    block_length: int | None = Field(description="null: full diffusion")
    max_tokens: list[int] = Field(description="By choice: longest text.")
    fill_after_end: bool
    cache: Literal["none", "prefix", "dual"] = Field(description="none: every forward pass was a full one.")
    temperature: float
    seeds: list[int] = Field(description="By choice: sent as `seed` with n = 1, it gives that choice again.")
    warnings: list[str] = Field([], exclude_if=_empty, description="What may make the answer worse than it could be.")


class ForwardPass(BaseModel):
    """What one forward pass committed. Positions count from the start of the generation region.

    Those from `max_tokens` on belong to the last block and are no part of the text.
    """

    forward: int = Field(description="Number of the forward pass, from 1.")
    positions: list[int]
    tokens: list[int]
    token_texts: list[str]
    confidences: list[float]
    filled: list[int] = Field(description="Positions after an end-of-text that were settled as padding.")
    replaced: list[int] = Field(
        [], exclude_if=_empty, description="Those of the positions that had another token before."
    )
    remasked: list[int] = Field([], exclude_if=_empty, description="Positions that were masked again.")
    draft: list[int] = Field(
        [],
        exclude_if=_empty,
        description="Of a model without a mask token: what would be committed by now at the block's open positions.",
    )
    draft_texts: list[str] = Field([], exclude_if=_empty, description="Their texts.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Finish | None = None
    trajectory: list[ForwardPass] | None = Field(None, exclude_if=_absent)


class Completion(BaseModel):
    """The answer of `/v1/completions`, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    unmask: EffectiveSettings | None = Field(None, exclude_if=_absent)


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] = Field(description="Those of all tokens together are the text's. Special tokens have none.")
    top_logprobs: list[Any] = []


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    trajectory: list[ForwardPass] | None = Field(None, exclude_if=_absent)


class ChatCompletion(BaseModel):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    unmask: EffectiveSettings


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(None, exclude_if=_absent)
    content: str | None = Field(None, exclude_if=_absent)


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    trajectory: list[ForwardPass] | None = Field(None, exclude_if=_absent)


class ChatChunk(BaseModel):
    """A chunk of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    unmask: EffectiveSettings | None = Field(None, exclude_if=_absent)


class Model(BaseModel):
    """A name that requests can use."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["unmask"] = "unmask"
    root: str = Field(description="The model behind the name.")
    parent: str | None = Field(description="The name without the sampler.")
    max_model_len: int = Field(description="Longest canvas, prompt included, in tokens.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class SamplerCard(BaseModel):
    """A sampler that requests can use, or a modifier around one."""

    id: str
    object: Literal["sampler"] = "sampler"
    kind: Literal["sampler", "modifier"] = "sampler"
    description: str
    paper: str
    available: bool
    reason: str | None = Field(None, exclude_if=_absent, description="Why it is not available.")
    parameters: dict[str, Any] = Field(description="JSON schema of `sampler_params`, or of the modifier's `params`.")


class SamplerList(BaseModel):
    object: Literal["list"] = "list"
    data: list[SamplerCard]


class PolicyEntry(BaseModel):
    """A trained policy that requests can use."""

    id: str
    object: Literal["policy"] = "policy"
    model: str = Field(description="The `model` that chooses it.")
    takes_speed: bool = Field(description="Whether `sampler_params.speed` may be given.")
    action: str
    parameters: int = Field(description="Number of weights.")
    trained_on: dict[str, Any]
    measured: list[dict[str, Any]] = Field(description="Held-out results from its card.")


class PolicyList(BaseModel):
    object: Literal["list"] = "list"
    data: list[PolicyEntry]


class PolicyRemoved(BaseModel):
    id: str
    object: Literal["policy.deleted"] = "policy.deleted"
    deleted: Literal[True] = True


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(None, exclude_if=_absent, description="The tokens as the vocabulary has them.")


class Detokenized(BaseModel):
    prompt: str


class Health(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class WholeJson(Response):
    """JSON response that may be long: sent in pieces of one buffer, so that a slow reader causes no second copy."""

    media_type = "application/json"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(0, len(self.body), PIECE):
            await send({"type": "http.response.body", "body": self.body[start : start + PIECE], "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def json_response(body: BaseModel) -> Response:
    """Successful response."""
    return Response(body.model_dump_json(), media_type="application/json")
