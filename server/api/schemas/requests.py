"""Request bodies: accepted fields with their ranges, and unsupported ones."""

from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_MODIFIERS = 8
DEFAULT_MAX_TOKENS = 128
INT64 = 2**63

# Tags of unions. Validation puts them into an error's location; `request_error` drops them.
TEXT, TEXTS, IDS, ID_LISTS, PARTS, NONE = "(text)", "(texts)", "(ids)", "(id lists)", "(parts)", "(none)"

TokenId = Annotated[int, Field(ge=0, lt=INT64)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


def _prompt_kind(value: Any) -> str:
    if not isinstance(value, list):
        return TEXT
    first = value[0] if value else ""
    return ID_LISTS if isinstance(first, list) else TEXTS if isinstance(first, str) else IDS


def _content_kind(value: Any) -> str:
    return PARTS if isinstance(value, list) else NONE if value is None else TEXT


def _list_of_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else [] if value is None else value


Prompt = Annotated[
    Annotated[str, Tag(TEXT)]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag(TEXTS)]
    | Annotated[TokenIds, Tag(IDS)]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag(ID_LISTS)],
    Discriminator(_prompt_kind),
]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
StopList = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Stops = Annotated[StopList, BeforeValidator(_list_of_stops, json_schema_input_type=Stop | StopList | None)]


class Body(BaseModel):
    """A request body. Unknown fields are let through here; `fields` knows which of them are refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class ModifierBody(BaseModel):
    """A modifier around the sampler."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="A modifier of `/v1/samplers`.")
    params: dict[str, JsonValue] | None = Field(None, description="Its parameters.")


Modifiers = Annotated[list[ModifierBody], Field(max_length=MAX_MODIFIERS, fail_fast=True)]


class SamplerArguments(BaseModel):
    """A choice of sampler in the place that vLLM's clients have for extra arguments."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    sampler: str | None = None
    sampler_params: dict[str, JsonValue] | None = None
    modifiers: Modifiers | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    include_usage: bool | None = Field(None, description="Send one more chunk, with the usage and no choices.")
    continuous_usage_stats: bool | None = Field(
        None, description="Send with each chunk the usage so far of the choice that it belongs to."
    )


class GenerationBody(Body):
    """What completions and chats have in common."""

    model: str | None = Field(
        None, description="A model of `/v1/models`; `model:sampler` chooses the sampler too. Default: the served model."
    )
    max_tokens: Count | None = Field(
        None,
        description="Longest text, in tokens. A model that writes block by block denoises whole blocks and cuts it. "
        f"Default: what the context has left, at most {DEFAULT_MAX_TOKENS}.",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="How tokens are drawn. Default: 0, each committed position takes its likeliest token."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Draw from the smallest set of tokens whose probabilities reach this."
    )
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="Draw from this many likeliest tokens; 0 or -1: all."
    )
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None,
        description="Random stream of each prompt's first choice, the next has seed + 1. Default: random.",
    )
    stop: Stops = Field([], description=f"Texts before which to stop, at most {MAX_STOPS}.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = Field(
        None, description="Tokens that end the text, beside the model's own end-of-text."
    )
    ignore_eos: bool | None = Field(None, description="Do not let the model's own end-of-text end the text.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(None, description="Choices per prompt.")
    stream: bool | None = Field(None, description="Send text as soon as it can no longer change.")
    stream_options: StreamOptions | None = None
    sampler: str | None = Field(None, description="A sampler of `/v1/samplers`. Default: the server's.")
    sampler_params: dict[str, JsonValue] | None = Field(None, description="Parameters of the sampler in force.")
    modifiers: Modifiers | None = Field(
        None, description=f"What is around the sampler, in the order in which it applies, at most {MAX_MODIFIERS}."
    )
    vllm_xargs: SamplerArguments | None = Field(
        None, description="`sampler`, `sampler_params` and `modifiers` may be here instead."
    )
    block_length: Count | None = Field(
        None,
        description="Positions denoised together, blocks go left to right. "
        "null: the whole region (full diffusion), or a block-causal model's own blocks. Default: the model's own.",
    )
    fill_after_end: bool | None = Field(
        None,
        description="Settle all after a committed end-of-text at once, do not denoise padding. Default: true.",
    )
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None,
        description="Of your own requests, who waits with a smaller one is admitted first; with the admin key, of all. "
        "Default: 0.",
    )
    cache: Literal["none", "prefix", "dual"] | None = Field(
        None,
        description="Keys and values kept from a block's first forward for its others. none; prefix: of all before "
        "the block, exact for a block-causal model; dual: of all but the block. Default: the server's (--cache).",
    )
    return_trajectory: bool | None = Field(None, description="Add what each forward pass committed.")


class CompletionBody(GenerationBody):
    """`POST /v1/completions`"""

    prompt: Prompt = Field(description="A text, token ids, or a list of either.")
    suffix: str | None = Field(None, description="Text after the generation region (infilling).")
    echo: bool | None = Field(None, description="Put the prompt before the text.")
    add_special_tokens: bool | None = Field(
        None,
        description="Put special tokens around a prompt that is a text as the tokenizer does, such as a "
        "beginning-of-sequence. Default: true.",
    )
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = Field(
        None, description="0: the chosen token's log probability at the forward pass that committed it."
    )

    def prompts(self) -> list[str | list[int]]:
        """Prompts of the request, each a text or token ids. A list of numbers is one prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return cast(list[str | list[int]], self.prompt)


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a chat. Fields that are not listed here go to the chat template too."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag(TEXT)]
        | Annotated[list[TextPart], Field(fail_fast=True), Tag(PARTS)]
        | Annotated[None, Tag(NONE)],
        Discriminator(_content_kind),
    ] = Field(None, validate_default=True, description="A text or a list of them. An assistant's may be missing.")
    name: str | None = Field(None, description="For templates that tell who speaks; others leave it out.")
    reasoning_content: str | None = Field(
        None, description="What an assistant thought before its content, for templates that repeat it."
    )

    @field_validator("content")
    @classmethod
    def _only_assistants_are_silent(cls, content: Any, info: ValidationInfo) -> Any:
        role = info.data.get("role", "assistant")
        if content is None and role != "assistant":
            raise PydanticCustomError("missing", "a {role} message needs a text", {"role": role})
        return content

    def for_template(self) -> dict[str, Any]:
        """Message in the form of chat templates: role `developer` becomes `system`."""
        given = {"name": self.name, "reasoning_content": self.reasoning_content, **(self.model_extra or {})}
        content = self.content
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": [part.model_dump() for part in content] if isinstance(content, list) else content,
            **{name: each for name, each in given.items() if each is not None and name not in UNSUPPORTED_IN_MESSAGE},
        }


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`"""

    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="The newer name of max_tokens.")
    logprobs: bool | None = Field(
        None, description="The chosen tokens' log probabilities at the forward passes that committed them."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    add_special_tokens: bool | None = Field(
        None,
        description="Put the tokenizer's special tokens around the chat, beside those that its template writes. "
        "Default: false.",
    )


class TokenizeBody(Body):
    """`POST /tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        None, description="As in the completion of a prompt (default: true) or of a chat (default: false)."
    )
    add_generation_prompt: bool | None = Field(
        None, description="End a chat with the beginning of the assistant's message. Default: true."
    )
    return_token_strs: bool | None = Field(None, description="Add the tokens as the vocabulary has them.")


class DetokenizeBody(Body):
    """`POST /detokenize`"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class PolicyBody(Body):
    """`POST /v1/policies`"""

    name: str = Field(min_length=1, max_length=100, description="What requests will call it.")
    path: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="Subfolder of the server's --policy-dir that holds it. Default: the name.",
    )


UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tool_calls", "function_call", "audio"), ([], {}, "", False)),
    **dict.fromkeys(("prefix", "partial"), (False,)),  # the beginning of the answer, in some servers
}
"""Unsupported fields of a message, and the values without effect. Null is always one."""
