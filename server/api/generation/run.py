"""Start of a request's generations: from a validated body to the engine."""

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Generic, TypeVar

from samplers import CacheMode, Layout, TokenChoice
from samplers.loop.guard import told
from server.api.errors import budget_headers
from server.api.generation.choices import Choice
from server.api.generation.stopping import TextStop
from server.api.parameters import stated
from server.api.sampler_choice import SamplerChoice, SamplerRequest, runs_only_ours
from server.api.schemas.requests import DEFAULT_MAX_TOKENS, INT64, ChatBody, GenerationBody
from server.api.schemas.responses import EffectiveModifier, EffectiveSettings, Usage
from server.api.serving import Serving
from server.api.text_threads import Work
from server.engine import GenerationRequest, ModelInfo, Owner, RequestError
from server.engine.engine import CONTEXT_LENGTH_EXCEEDED, too_long
from server.engine.stream import EventStream, submit_to
from server.models.text.codec import TextTooLongError


@dataclass(frozen=True)
class EncodedPrompts:
    """Encoded prompts of a body.

    Attributes:
        prompts: token ids of each prompt.
        suffix: token ids after the generation region.
        max_tokens: None selects the default.
        prompt_field, length_field: names of these fields in the body.
        echo: text to put before the choices of each prompt; empty unless requested.
    """

    prompts: Sequence[list[int]]
    suffix: list[int]
    max_tokens: int | None
    prompt_field: str
    length_field: str = "max_tokens"
    echo: Sequence[str] = ()


@dataclass(frozen=True)
class StartedChoices:
    """Generations of a request, their settings, and the headers of the response."""

    prompts: EncodedPrompts
    choices: list[Choice]
    used: EffectiveSettings
    headers: dict[str, str]

    def usage_of(self, choice: Choice) -> Usage:
        """Usage of one choice so far."""
        prompt = len(self.prompts.prompts[choice.prompt]) + len(self.prompts.suffix)
        return Usage.of(prompt=prompt, completion=choice.completion_tokens, forwards=choice.forwards)

    def usage(self) -> Usage:
        """Total usage, once all choices have ended."""
        return Usage.of(
            prompt=sum(len(prompt) + len(self.prompts.suffix) for prompt in self.prompts.prompts),
            completion=sum(choice.completion_tokens for choice in self.choices),
            forwards=sum(choice.forwards for choice in self.choices),
        )


B = TypeVar("B", bound=GenerationBody)


@dataclass(frozen=True)
class Reader(Generic[B]):
    """Conversion of the texts in a route's bodies to tokens. Runs off the event loop, since it can take long.

    Attributes:
        prompts: encodes all prompts of a body. Raises RequestError.
        text: encodes a further text in the same way as the prompts, with the same errors; its field is for messages.
    """

    prompts: Callable[[Serving, B], EncodedPrompts]
    text: Callable[[Serving, B, str, str], list[int]]


async def start(
    serving: Serving, body: B, owner: Owner, size: int, count: int, reader: Reader[B], logprobs: bool
) -> StartedChoices:
    """Submit the generations of a body, all or none.

    Args:
        owner: owner of the request.
        size: bytes of the body.
        count: number of prompts in the body.
        reader: makes tokens of the prompts.

    Raises RequestError, QueueFullError, KeyLimitError, NotServingError.
    """
    sampler_request = serving.model_names.choose(body)
    number = body.n or 1
    total = count * number
    if total > serving.settings.max_queue:
        raise RequestError(
            "n" if count == 1 else "prompt",
            f"{count} prompts with {number} choices each are {total} generations, more than the queue takes "
            f"({serving.settings.max_queue}, --max-queue): send fewer at a time",
        )
    serving.engine.check_room(owner, total)
    streams = [EventStream(serving.engine, every_pass=bool(body.return_trajectory)) for _ in range(total)]
    work = partial(_submit, serving, body, owner, sampler_request, reader, streams)
    kind = Work.CHAT if isinstance(body, ChatBody) else Work.TEXT
    if not runs_only_ours(sampler_request, serving.model_names.default):
        kind = Work.SAMPLER
    encoded, used = await serving.threads.run(work, owner, size, kind)
    choices = [
        Choice(
            stream,
            serving.text,
            i,
            i // number,
            body.stop,
            logprobs,
            bool(body.return_trajectory),
            several=stream.generation is not None and len(stream.generation.row.lanes) > 1,
        )
        for i, stream in enumerate(streams)
    ]
    return StartedChoices(encoded, choices, used, budget_headers(serving.engine.budget(owner)))


def _submit(
    serving: Serving,
    body: B,
    owner: Owner,
    sampler_request: SamplerRequest,
    reader: Reader[B],
    streams: list[EventStream],
) -> tuple[EncodedPrompts, EffectiveSettings]:
    serving.engine.check_accepting()  # before long work, and after a possibly long wait for it
    further = FurtherPrompts(serving, body, reader)
    chosen = serving.model_names.sampler_choice(sampler_request, further.encode)
    encoded = reader.prompts(serving, body)
    requests, used = _requests(serving, body, owner, chosen, encoded)
    further.check_length(encoded, max(used.max_tokens))
    try:
        submit_to(streams, serving.engine, requests)
    except RequestError as error:
        names = {"prompt": encoded.prompt_field, "max_tokens": encoded.length_field}
        raise RequestError(names.get(error.field, error.field), str(error), error.code) from None
    layouts = [stream.generation.row.canvas.layout for stream in streams if stream.generation is not None]
    used.warnings += _context_warnings(serving.engine.info, layouts)
    return encoded, used


def _requests(
    serving: Serving, body: GenerationBody, owner: Owner, chosen: SamplerChoice, encoded: EncodedPrompts
) -> tuple[list[GenerationRequest], EffectiveSettings]:
    info = serving.engine.info
    block_length = info.blocks(body.block_length if "block_length" in body.model_fields_set else info.block_length)
    ends = (frozenset() if body.ignore_eos else info.end_ids) | _named_ends(serving, body)
    number = body.n or 1
    left = [info.max_length - len(prompt) - len(encoded.suffix) for prompt in encoded.prompts]
    lengths = [encoded.max_tokens or max(1, min(DEFAULT_MAX_TOKENS, each)) for each in left]
    choice = TokenChoice(body.temperature or 0.0, body.top_p or 1.0, max(0, body.top_k or 0))
    seeds = _seeds(body.seed, len(encoded.prompts), number)
    fill_after_end = body.fill_after_end is not False
    cache = CacheMode(body.cache or serving.settings.cache or info.cache)
    check_ids("stop_token_ids", body.stop_token_ids or [], info.vocab_size)
    requests = [
        GenerationRequest(
            prompt=prompt,
            max_tokens=lengths[i],
            sampler=chosen.sampler,
            params=chosen.params,
            name=chosen.name,
            modifiers=[(each.modifier, each.params) for each in chosen.modifiers],
            suffix=encoded.suffix,
            block_length=block_length,
            choice=choice,
            seed=seeds[i * number + j],
            end_ids=ends | frozenset(body.stop_token_ids or []),
            stop=TextStop(serving.text, body.stop) if body.stop else None,
            fill_after_end=fill_after_end,
            cache=cache,
            timeout=serving.settings.request_timeout or None,
            counts_prompt=j == 0,
            priority=body.priority or 0,
            owner=owner,
        )
        for i, prompt in enumerate(encoded.prompts)
        for j in range(number)
    ]
    used = EffectiveSettings(
        sampler=chosen.name,
        sampler_params=stated(chosen.sampler, chosen.params),
        modifiers=[EffectiveModifier(name=each.modifier.name, params=each.stated) for each in chosen.modifiers],
        block_length=block_length,
        max_tokens=[request.max_tokens for request in requests],
        fill_after_end=fill_after_end,
        cache=cache.value,
        temperature=choice.temperature,
        seeds=seeds,
        warnings=_resource_warnings(serving, chosen, block_length, lengths),
    )
    return requests, used


def _context_warnings(info: ModelInfo, layouts: Sequence[Layout]) -> list[str]:
    """Warn if the context ends within the last block, which is then denoised without the positions that do not fit."""
    missing = max(layout.missing for layout in layouts)
    if not missing:
        return []
    limit = f" ({info.length_limit})" if info.length_limit else ""
    return [
        f"the last block ends at the context's {info.max_length} tokens{limit}, {missing} short of a whole one: its "
        "text may differ from what a longer context would give"
    ]


def _resource_warnings(
    serving: Serving, chosen: SamplerChoice, block_length: int | None, lengths: list[int]
) -> list[str]:
    resources, sampler, params = serving.model_names.resources, chosen.sampler, chosen.params
    found = [told(sampler, resources.warnings, sampler, params, block_length, length) for length in lengths]
    return list(dict.fromkeys(chain.from_iterable(found)))


class FurtherPrompts:
    """Prompts in parameters of modifiers, checked like the request's own."""

    def __init__(self, serving: Serving, body: B, reader: Reader[B]) -> None:
        self._serving = serving
        self._text = partial(reader.text, serving, body)
        self._lengths: dict[str, int] = {}

    def encode(self, field: str, prompt: str | list[int]) -> list[int]:
        """Tokens of the prompt in this field. Raises RequestError."""
        ids = self._text(field, prompt) if isinstance(prompt, str) else prompt
        check_ids(field, ids, self._serving.engine.info.vocab_size)
        check_masks(self._serving, field, ids)
        self._lengths[field] = len(ids)
        return ids

    def check_length(self, encoded: EncodedPrompts, max_tokens: int) -> None:
        """Raise RequestError if a prompt leaves no room for the maximum text."""
        info = self._serving.engine.info
        for field, length in self._lengths.items():
            given = length + len(encoded.suffix)
            if given + max_tokens > info.max_length:
                raise RequestError(field, too_long(info, given, max_tokens), CONTEXT_LENGTH_EXCEEDED)


@contextmanager
def refusing_long(serving: Serving, field: str, max_tokens: int | None = None) -> Iterator[None]:
    """Report a text that is too long for the context with the message the engine uses for its tokens."""
    try:
        yield
    except TextTooLongError as error:
        message = too_long(serving.engine.info, error.at_least, max_tokens or 1, at_least=True)
        raise RequestError(field, message, CONTEXT_LENGTH_EXCEEDED) from None


def check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError if a token id is outside the vocabulary."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise RequestError(field, f"{field}: {largest} is not a token id, the model has {vocab_size} of them")


def _named_ends(serving: Serving, body: GenerationBody) -> frozenset[int]:
    """Special tokens named as stop strings, which texts leave out. Raises RequestError for the mask token."""
    mask = serving.engine.info.mask_id
    if mask is not None and mask in (body.stop_token_ids or []):
        raise RequestError("stop_token_ids", f"{mask} is the mask token, which no text ends with: leave it out")
    found = [serving.text.special_token_id(stop) for stop in body.stop]
    return frozenset(id for id in found if id is not None and id != mask)


def check_masks(serving: Serving, field: str, ids: Sequence[int]) -> None:
    """Raise RequestError for mask tokens outside the generation region, where they would never be filled."""
    mask = serving.engine.info.mask_id
    if mask is not None and mask in ids:
        raise RequestError(
            field,
            f"{field}: the mask token {serving.text.token(mask)} ({mask}) is in it, but only the generation region is "
            "filled; a completion takes the text before it as prompt and the text after it as suffix",
        )


def _seeds(seed: int | None, prompts: int, number: int) -> list[int]:
    """Seed of each choice.

    A given seed starts every prompt's choices, so that the result of a prompt does not depend on the rest of the
    request. Without one, no two choices share a stream.
    """
    if seed is None:
        # JSON parsers preserve integers of up to 53 bits.
        return [secrets.randbits(53) for _ in range(prompts * number)]
    return [(seed + j + INT64) % (2 * INT64) - INT64 for _ in range(prompts) for j in range(number)]
