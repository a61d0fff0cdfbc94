"""Unknown fields of a body: those refused, with the replacement to suggest, and those ignored.

A field that would change the answer is refused by name. A harmless one, about accounts, caches or scheduling, is
ignored. Any other unknown field is ignored too, unless it looks like a misspelt field of ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from samplers import describe, named_samplers
from server.api.schemas.requests import (
    UNSUPPORTED_IN_MESSAGE,
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    Message,
    PolicyBody,
    SamplerArguments,
    TokenizeBody,
)

Given = Mapping[str, Any]
"""All given fields by name."""


@dataclass(frozen=True)
class Refusal:
    """Reason to refuse a field.

    Attributes:
        neutral: values without effect; null is always one.
        instead: suggestion to the client.
        agrees: tells if a value only repeats what other fields say.
    """

    neutral: tuple[Any, ...] = ()
    instead: str = "leave it out"
    agrees: Callable[[Any, Given], bool] | None = None

    def concerns(self, value: Any, given: Given) -> bool:
        """True if this value is refused, given the other fields."""
        if value is None or value in self.neutral:
            return False
        if -1 in self.neutral and isinstance(value, int | float) and value < 0:
            return False  # where -1 switches something off, so does any negative number
        return self.agrees is None or not self.agrees(value, given)


Refusals = dict[str, Refusal]


def _refused(names: str, *neutral: Any, instead: str = "leave it out") -> Refusals:
    return dict.fromkeys(names.split(), Refusal(neutral, instead))


def _renamed(field: str, names: str, *neutral: Any) -> Refusals:
    """Other programs' names of a field of ours. Some clients send several of them, which is harmless if they agree."""

    def agrees(value: Any, given: Given) -> bool:
        return given.get(field) is not None and given[field] in (value, [value])

    return dict.fromkeys(names.split(), Refusal(neutral, f"write {field}", agrees))


def _ignored(names: str, why: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


def _as_the_temperature(value: Any, given: Given) -> bool:
    return value is ((given.get("temperature") or 0) > 0)


NOTHING: tuple[Any, ...] = ([], {}, "", False)
GUIDANCE = '[{"name": "guidance", "params": {"scale": ...}}]'
NEGATIVE_PROMPT = '[{"name": "guidance", "params": {"scale": ..., "negative_prompt": ...}}]'

# OpenAI, vLLM, SGLang, llama.cpp, text-generation-inference, Ollama, text-generation-webui, Hugging Face's `generate`.
_OUTPUT_FORMAT = _refused(
    "response_format structured_outputs structural_tag guided_decoding guided_json guided_regex guided_choice "
    "guided_grammar guided_whitespace_pattern regex regex_pattern json_schema ebnf grammar grammar_string grammar_lazy "
    "grammar_triggers guideline format nvext",
    *(*NOTHING, "text", {"type": "text"}),
    instead="leave it out, the form of the text cannot be prescribed",
)
_CHOICE_OF_TOKENS = {
    **_refused("presence_penalty frequency_penalty penalty_alpha dry_multiplier", 0),
    **_refused("repetition_penalty repeat_penalty rep_pen encoder_repetition_penalty length_penalty", 1),
    **_refused("no_repeat_ngram_size encoder_no_repeat_ngram_size repetition_detection", 0, -1, {}),
    **_refused("logit_bias bad_words bad_words_ids banned_tokens banned_strings custom_token_bans", *NOTHING),
    **_refused("allowed_token_ids sequence_bias force_words_ids suppress_tokens begin_suppress_tokens", *NOTHING),
    **_refused("logits_processors logits_processor custom_logit_processor custom_params", *NOTHING),
    **_refused("ban_eos_token", False, instead="write ignore_eos to go on after an end-of-text"),
    **_refused("min_p top_a epsilon_cutoff eta_cutoff mirostat mirostat_mode smoothing_factor skew", 0),
    **_refused("xtc_probability dynatemp_range top_n_sigma nsigma adaptive_target", 0, -1),
    **_refused("typical_p typical tfs tfs_z min_keep", 0, 1),
    **_refused("dynamic_temperature temperature_last watermark watermarking early_stopping use_beam_search", False),
    **_refused("num_beams num_beam_groups best_of", 0, 1),
    **_refused("guidance_scale", 1, instead=f"write modifiers, {GUIDANCE}; guidance_scale is scale + 1"),
    **_refused("negative_prompt negative_prompt_ids", *NOTHING, instead=f"write modifiers, {NEGATIVE_PROMPT}"),
    **_refused("samplers", *NOTHING, instead="write sampler, one of /v1/samplers"),
    **_renamed("temperature", "temp"),
    **_renamed("seed", "sampling_seed sampler_seed random_seed", -1),
    "do_sample": Refusal((), "write temperature, which is 0 for texts that are not drawn", _as_the_temperature),
}
_LENGTH_AND_END = {
    **_renamed(
        "max_tokens",
        "max_new_tokens n_predict num_predict max_output_tokens max_gen_toks max_gen_len max_length out_seq_len "
        "gen_length gen_len generation_length",
    ),
    **_refused("min_tokens min_new_tokens min_length max_tokens_second", 0, -1),
    **_refused(
        "max_time t_max_predict_ms truncate_prompt_tokens truncation_side truncate n_keep n_indent", 0, -1, False
    ),
    **_renamed("n", "n_cmpl num_return_sequences num_choices"),
    **_renamed("stop", "stop_words stop_sequences stop_sequence stopping_strings stop_strings", *NOTHING),
    **_renamed("stop_token_ids", "eos_token_id eos_token_ids stop_token stop_tokens stop_ids", *NOTHING),
    **_renamed("ignore_eos", "ignore_eos_token", False),
    **_refused("stop_regex", *NOTHING, instead="write texts as stop"),
    **_refused("include_stop_str_in_output no_stop_trim", False),
    **_refused("skip_special_tokens trim_stop", True),
}
_EXTRA_OUTPUT = {
    **_refused(
        "prompt_logprobs top_n_tokens top_logprobs_num logprob_token_ids token_ids_logprob return_text_in_logprobs "
        "post_sampling_probs return_token_ids return_token_strs return_tokens return_tokens_as_token_ids "
        "return_token_offsets return_prompt_text return_hidden_states return_routed_experts return_indexer_topk "
        "return_sampling_mask return_cached_tokens_details return_progress return_mm_kwargs timings_per_token "
        "decoder_input_details details response_fields",
        *(*NOTHING, -1),
    ),
    **_renamed("logprobs", "n_probs return_logprob return_logprobs", 0),
    **_renamed("echo", "return_full_text", False),
    **_refused("continuous_usage_stats include_usage", False, instead="write it in stream_options"),
}
_THINKING = _refused(
    "enable_thinking thinking think thinking_budget thinking_token_budget thinking_forced_open reasoning "
    "reasoning_budget reasoning_budget_tokens",
    *(*NOTHING, -1, "none", {"type": "disabled"}, {"enabled": False}, {"effort": "none"}),
    instead="leave it out, no model here thinks before it answers",
)
_ELSEWHERE = {
    **_refused(
        "extra_body parameters sampling_params options", *NOTHING, instead="write its fields in the body itself"
    ),
    **_refused("prompt_embeds input_embeds images image_data audio_data video_data mm_payload context", *NOTHING),
    **_refused("mm_processor_kwargs media_io_kwargs lora lora_path lora_request adapter_id", *NOTHING),
    **_refused("session_params kv_transfer_params ec_transfer_params bootstrap_host bootstrap_room", *NOTHING),
    **_refused("raw", False, instead="write a prompt to /v1/completions"),
}
# Programs published with diffusion language models. Their samplers' parameters mostly correspond to ours.
_DIFFUSION = {
    **_renamed("block_length", "block_size block_len gen_blocklength canvas_length canvas_size"),
    **_renamed(
        "sampler", "remasking remasking_strategy remask_strategy unmask_strategy decoding_strategy dllm_algorithm"
    ),
    **_refused("cfg cfg_scale", 0, instead=f"write modifiers, {GUIDANCE}"),
    **_refused(
        "diffusion_steps denoising_steps num_steps num_diffusion_steps max_steps nfe",
        instead="write sampler_params.steps, for a sampler that has it",
    ),
    **_refused(
        "steps_per_block minimal_topk num_to_transfer num_transfer_tokens",
        instead="write sampler_params.k, for a sampler that has it",
    ),
    **_refused("dllm_algorithm_config", *NOTHING, instead="write sampler_params"),
    **_refused(
        "conf_threshold dynamic_threshold unmask_threshold tau",
        instead="write sampler_params.threshold, for a sampler that has it",
    ),
    **_refused("alg_temperature remask_temperature", 0, instead="write sampler_params.alg_temp, for sampler dream"),
    **_refused("use_cache prefix_cache use_block_cache", False, instead='write cache, which is "prefix" or "dual"'),
    **_refused("dual_cache use_dual_cache", False, instead='write cache, which is "dual"'),
    **_refused("small_block_size sub_block_size sub_block_length mask_id mask_token_id"),
    **_refused("logits_eos_inf confidence_eos_eot_inf eos_early_stop eos_suppress", False),
}
_GENERATION = _OUTPUT_FORMAT | _CHOICE_OF_TOKENS | _LENGTH_AND_END | _EXTRA_OUTPUT | _THINKING | _ELSEWHERE | _DIFFUSION
_TEMPLATE = {
    **_refused("chat_template documents tools", *NOTHING),
    **_refused("continue_final_message", False),
}
REFUSED: dict[type[BaseModel], Refusals] = {
    CompletionBody: {
        **_GENERATION,
        **_renamed("max_tokens", "max_completion_tokens"),
        **_refused("top_logprobs", 0),
        **_renamed("prompt", "prompts inputs input text input_ids prompt_token_ids"),
        **_refused("infill middle input_prefix input_suffix", *NOTHING, instead="write prompt and suffix"),
        **_refused("messages system template tools", *NOTHING, instead="write it to /v1/chat/completions"),
    },
    ChatBody: {
        **_GENERATION,
        **_TEMPLATE,
        **_refused("add_generation_prompt", True),
        **_refused("tool_choice function_call", "none", "auto"),
        **_refused("functions parse_tool_calls tool_prompt audio prediction web_search_options", *NOTHING),
        **_refused("web_search search_parameters plugins", *NOTHING),
        **_refused("modalities", [], ["text"]),
        **_refused("template system system_prompt", *NOTHING, instead="write it as a message"),
        **_refused("prompt prompts inputs input input_ids", *NOTHING, instead="write messages"),
        **_refused("suffix", *NOTHING, instead="write it to /v1/completions"),
        **_refused("echo", False, instead="write it to /v1/completions"),
    },
    TokenizeBody: _TEMPLATE,
    DetokenizeBody: {},
    PolicyBody: {},
    Message: {name: Refusal(neutral) for name, neutral in UNSUPPORTED_IN_MESSAGE.items()},
}
HARMLESS = {
    **_ignored(
        "user metadata safety_identifier request_id rid session_id trace_id extra_key custom_labels store moderation "
        "api_type api_server legacy_api",
        "says who asks, and what is kept of it",
    ),
    **_ignored(
        "service_tier models mode provider route id_slot slot_id routed_dp_rank data_parallel_rank bootstrap_port "
        "disagg_prefill_dp_rank keep_alive",
        "says where and when it runs",
    ),
    **_ignored(
        "prompt_cache_key prompt_cache_options prompt_cache_retention cache_salt cache_prompt n_cache_reuse num_ctx "
        "n_ctx n_discard truncation_length",
        "says what memory to use and what to keep: the text is the same",
    ),
    **_ignored(
        "parallel_tool_calls reasoning_effort verbosity include_reasoning separate_reasoning stream_reasoning "
        "reasoning_format reasoning_in_content",
        "a hint for models that use tools or reason apart from their answer, which those served here do not",
    ),
    **_ignored(
        "guided_decoding_backend repeat_last_n rep_pen_range repetition_penalty_range penalize_nl mirostat_tau "
        "mirostat_eta xtc_threshold dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers "
        "dynatemp_exponent smoothing_curve logprob_start_len sampler_order sampler_priority adaptive_decay",
        "a detail of what is refused where it is switched on",
    ),
    **_ignored(
        "stream_interval include_obfuscation spaces_between_special_tokens clean_up_tokenization_spaces",
        "says how the text is cut or padded: it is the same in all",
    ),
}
"""Fields ignored deliberately, even if they resemble others, with the reason why that is harmless."""
MAX_NAME = 100
"""Characters of a name that is compared with ours."""
MIN_SIMILARITY = 0.86
"""Minimum similarity, as computed by difflib, of a longer name to the one it misspells."""


def refusal(cls: type[BaseModel], name: str, given: Given) -> str | None:
    """Suggestion for a field that the body does not have; None if it is harmless."""
    value = given[name]
    if value is None:
        return None
    if len(name) > MAX_NAME:  # longer names resemble none of ours, and look-ups are cached
        return _elsewhere(name) if issubclass(cls, SamplerArguments) else None
    harmless, known = _known(name, cls)
    if harmless:
        return None
    if known:
        return known.instead if known.concerns(value, given) else None
    if issubclass(cls, SamplerArguments):
        return _elsewhere(name)
    if issubclass(cls, GenerationBody) and (samplers := _parameters().get(name)):
        return None if value is False else f"write sampler_params.{name}, for sampler {' or '.join(samplers)}"
    return misspelt(name, cls)


@lru_cache(maxsize=4096)
def _known(name: str, cls: type[BaseModel]) -> tuple[bool, Refusal | None]:
    """True if a name in any style belongs to a harmless field, and the refusal of a refused one."""
    refused = REFUSED.get(cls, {})
    found = refused.get(name) or refused.get(_by_plain_name(refused).get(_plain(name), ""))
    return _plain(name) in _by_plain_name(HARMLESS), found


@lru_cache(maxsize=4096)
def misspelt(name: str, cls: type[BaseModel]) -> str | None:
    """Correct spelling of a name that resembles one of the body's fields or a refused one."""
    refused = REFUSED.get(cls, {})
    if found := _nearest(name, cls.model_fields, 3):
        return _suggestion(found, name, found)
    if issubclass(cls, GenerationBody) and (found := _nearest(name, _parameters(), 6)):
        return _suggestion(f"sampler_params.{found}", name, found)
    if found := _nearest(name, refused, 6):
        return f"if it is to be {found}: {refused[found].instead}"
    return None


def _suggestion(instead: str, name: str, found: str) -> str:
    sure = _plain(name) == _plain(found)
    return f"write {instead}" if sure else f"write {instead} if you mean that, else leave it out"


def _nearest(name: str, names: Iterable[str], shortest: int) -> str | None:
    """Name that matches in another style or, if at least this long, with a misspelling."""
    plain, known = _plain(name), _by_plain_name(names)
    if plain in known or len(plain) < shortest:
        return known.get(plain)
    slips = [each for each in known if _is_slip(plain, each)]
    close = slips or (get_close_matches(plain, known, 1, MIN_SIMILARITY) if len(plain) > 4 else [])
    return known[close[0]] if close else None


def _is_slip(a: str, b: str) -> bool:
    """True if the names differ by one typing error; in a short name a different letter makes a different name."""
    if min(len(a), len(b)) < 3:
        return False  # e.g. k and n
    start = next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))
    x, y = a[start:], b[start:]
    if len(x) == len(y):
        return (x[2:] == y[2:] and x[:2] == y[1::-1]) or (x[1:] == y[1:] and len(a) > 4)
    longer, shorter = (x, y) if len(x) > len(y) else (y, x)
    return longer[1:] == shorter


def _elsewhere(name: str) -> str:
    """Suggestion for a field in `vllm_xargs`, all of whose fields are meant to affect the answer."""
    if name in _parameters():
        return f"write sampler_params.{name}"
    if any(name in cls.model_fields for cls in (CompletionBody, ChatBody)):
        return f"write {name} in the body itself"
    return "there are only sampler, sampler_params and modifiers"


def _plain(name: str) -> str:
    """Name in lower case without separators."""
    return name.lower().replace("_", "").replace("-", "")


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Original names by their plain form."""
    return {_plain(each): each for each in names}


def _parameters() -> dict[str, list[str]]:
    """All samplers' parameters, with the samplers that have them."""
    found: dict[str, list[str]] = {}
    for sampler in named_samplers():
        for name in describe(sampler).parameters:
            found.setdefault(name, []).append(sampler)
    return found


def bodies() -> Iterable[type[Body]]:
    """All request bodies."""
    return [cls for cls in REFUSED if issubclass(cls, Body)]
