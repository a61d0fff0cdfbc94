"""Fields that a request does not have: refused with what to write instead where they would change the answer."""

import json
import time
from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from samplers import list_samplers
from server.api.schemas.bodies import MAX_UNKNOWN
from server.api.schemas.fields import HARMLESS, REFUSED
from server.api.schemas.requests import ChatBody, CompletionBody
from tests.api.serving import PROMPT, Running, error_of

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
RIGHT: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
    COMPLETE: {"prompt": PROMPT, "max_tokens": 2},
}

# Field, a value, and what the error must tell to write.
INSTEAD: list[tuple[str, Any, str]] = [
    ("regex", "[0-9]+", "leave it out"),
    ("json_schema", {"type": "object"}, "leave it out"),
    ("ebnf", "root ::= 'a'", "leave it out"),
    ("grammar", "root ::= 'a'", "leave it out"),
    ("guided_decoding", {"regex": "a"}, "leave it out"),
    ("structural_tag", {"structures": []}, "leave it out"),
    ("format", "json", "leave it out"),
    ("nvext", {"guided_json": {}}, "leave it out"),
    ("stop_regex", "a+", "stop"),
    ("stop_words", ["a"], "stop"),
    ("stop_sequences", ["a"], "stop"),
    ("stopping_strings", ["a"], "stop"),
    ("eos_token_id", 5, "stop_token_ids"),
    ("max_new_tokens", 5, "max_tokens"),
    ("n_predict", 5, "max_tokens"),
    ("num_predict", 5, "max_tokens"),
    ("gen_length", 5, "max_tokens"),
    ("max_gen_toks", 5, "max_tokens"),
    ("max_output_tokens", 5, "max_tokens"),
    ("min_new_tokens", 5, "leave it out"),
    ("typical_p", 0.5, "leave it out"),
    ("no_repeat_ngram_size", 3, "leave it out"),
    ("repeat_penalty", 1.1, "leave it out"),
    ("mirostat", 2, "leave it out"),
    ("xtc_probability", 0.5, "leave it out"),
    ("dry_multiplier", 0.8, "leave it out"),
    ("do_sample", True, "temperature"),
    ("return_token_ids", True, "leave it out"),
    ("return_token_strs", True, "leave it out"),
    ("return_hidden_states", True, "leave it out"),
    ("return_full_text", True, "echo"),
    ("n_probs", 3, "logprobs"),
    ("thinking_token_budget", 100, "leave it out"),
    ("enable_thinking", True, "leave it out"),
    ("thinking", {"type": "enabled", "budget_tokens": 100}, "leave it out"),
    ("steps", 8, "sampler_params.steps"),
    ("threshold", 0.9, "sampler_params.threshold"),
    ("alg", "entropy", "sampler_params.alg"),
    ("k", 2, "sampler_params.k"),
    ("remasking", "low_confidence", "sampler"),
    ("remasking_strategy", "low_confidence_dynamic", "sampler"),
    ("cfg_scale", 1.5, "guidance"),
    ("block_size", 32, "block_length"),
    ("gen_blocklength", 32, "block_length"),
    ("denoising_steps", 8, "sampler_params.steps"),
    ("use_cache", True, "cache"),
    ("extra_body", {"sampler": "topk"}, "the body itself"),
    ("options", {"num_predict": 5}, "the body itself"),
    # misspelt
    ("block_lenght", 8, "block_length"),
    ("blockLength", 8, "block_length"),
    ("block-length", 8, "block_length"),
    ("max_token", 8, "max_tokens"),
    ("maxTokens", 8, "max_tokens"),
    ("MAX_TOKENS", 8, "max_tokens"),
    ("temprature", 0.5, "temperature"),
    ("tempreature", 0.5, "temperature"),
    ("Temperature", 0.5, "temperature"),
    ("topP", 0.5, "top_p"),
    ("topp", 0.5, "top_p"),
    ("samplerparams", {"k": 2}, "sampler_params"),
    ("sampler_param", {"k": 2}, "sampler_params"),
    ("samler", "topk", "sampler"),
    ("sampelr", "topk", "sampler"),
    ("strem", True, "stream"),
    ("straem", True, "stream"),
    ("stream_option", {}, "stream_options"),
    ("stop_token_id", [5], "stop_token_ids"),
    ("ignore_eot", True, "ignore_eos"),
    ("fill_after_ends", True, "fill_after_end"),
    ("return_trajectry", True, "return_trajectory"),
    ("treshold", 0.5, "sampler_params.threshold"),
    ("logprob", 1, "logprobs"),
    ("cach", "dual", "cache"),
    ("stp", ["x"], "stop"),
    ("sed", 3, "seed"),
    ("streem", True, "stream"),
    ("suffixx", "x", "suffix"),
    # others' names in another style, or misspelt
    ("maxNewTokens", 3, "max_tokens"),
    ("maxOutputTokens", 3, "max_tokens"),
    ("stopSequences", ["x"], "stop"),
    ("presencePenalty", 0.5, "leave it out"),
    ("logitBias", {"5": 1}, "leave it out"),
    ("enableThinking", True, "leave it out"),
    ("grammer", "root ::= x", "leave it out"),
    ("guided_regexp", "a+", "leave it out"),
    ("response_formats", {"type": "json_object"}, "leave it out"),
    ("no_repeat_ngram", 2, "leave it out"),
    ("return_token_id", True, "leave it out"),
    # of the originals' own programs
    ("minimal_topk", 2, "sampler_params.k"),
    ("num_to_transfer", 2, "sampler_params.k"),
    ("stop_token", 5, "stop_token_ids"),
    ("dllm_algorithm_config", {"threshold": 0.5}, "sampler_params"),
    ("continuous_usage_stats", True, "stream_options"),
]


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
@pytest.mark.parametrize(("name", "value", "instead"), INSTEAD, ids=lambda value: str(value)[:30])
def test_what_would_change_the_answer_is_refused_with_what_to_write(
    server: Running, path: str, name: str, value: Any, instead: str
) -> None:
    error = error_of(server.post(path, RIGHT[path] | {name: value}), 400)
    assert error["param"] == name and error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{name} is not supported")
    assert instead in error["message"].partition("): ")[2]


@pytest.mark.parametrize("parameter", sorted({name for s in list_samplers() for name in s.Params.model_fields}))
def test_a_samplers_parameter_outside_of_its_parameters(server: Running, parameter: str) -> None:
    if parameter in CompletionBody.model_fields:
        return
    for path, where in ((COMPLETE, ""), (CHAT, ""), (COMPLETE, "vllm_xargs.")):
        fields = {parameter: 0.123} if not where else {"vllm_xargs": {parameter: 0.123}}
        error = error_of(server.post(path, RIGHT[path] | fields), 400)
        assert error["param"] == f"{where}{parameter}"
        assert f"sampler_params.{parameter}" in error["message"]


NEUTRAL = [
    {"adaptive_target": -0.01, "adaptive_decay": 0.9},  # SillyTavern's defaults
    {"serviceTier": "auto", "mode": "instruct", "models": ["x"], "betas": []},
    *({name: None} for name, _, _ in INSTEAD),
    *(
        {name: False}
        for name in ("return_token_ids", "enable_thinking", "use_beam_search", "return_full_text", "think")
    ),
    *(
        {name: 0}
        for name in (
            "adaptive_target",
            "min_p",
            "mirostat",
            "xtc_probability",
            "cfg_scale",
            "no_repeat_ngram_size",
            "min_tokens",
        )
    ),
    *({name: 1} for name in ("repeat_penalty", "typical_p", "best_of", "num_beams", "tfs_z", "guidance_scale")),
    *({name: []} for name in ("stop_words", "bad_words", "samplers")),
    *({name: ""} for name in ("grammar", "regex", "negative_prompt")),
    {"thinking": {"type": "disabled"}},
    {"response_format": {"type": "text"}},
    {"repetition_penalty": 1.0, "presence_penalty": 0.0, "typical_p": 1.0},
    {"max_new_tokens": 2, "n_predict": 2},  # as max_tokens says
    {"stop": "zzz", "stop_words": ["zzz"], "stopping_strings": "zzz"},
    {"seed": 5, "sampler_seed": 5},
    {"do_sample": True, "temperature": 0.5},
    {"do_sample": False, "temperature": 0},
    {"do_sample": False},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": False}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
    {"vllm_xargs": {"sampler": "topk", "anything": None}},
    {"vllm_xargs": {"sampler": "topk", "seed": 5}, "seed": 5},
]


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_what_asks_for_nothing_is_let_through(server: Running, path: str, fields: dict[str, Any]) -> None:
    answer = server.post(path, RIGHT[path] | fields)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_harmless_and_unknown_fields_are_let_through(server: Running, path: str) -> None:
    harmless: dict[str, Any] = dict.fromkeys(HARMLESS, "x")
    others = {"my_own_field": 1, "prompt_id": "x", "model_id": 5, "stream_id": "a", "user_id": 3, "topic": 1, "x": 2}
    others |= dict.fromkeys(("json", "schema", "copy", "dict", "model_dump", "model_extra", "__class__"), 1)
    expected = server.post(path, RIGHT[path]).json()
    answer = server.post(path, RIGHT[path] | harmless | others)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected["choices"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"stream": True, "stream_options": {"continuous_usage_stat": True}}, "stream_options.continuous_usage_stat"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": 1}}, "stream_options.continuous_usage_stats"),
        ({"stream": True, "stream_options": {"includeUsage": True}}, "stream_options.includeUsage"),
        ({"vllm_xargs": {"block_length": 8}}, "vllm_xargs.block_length"),
        ({"vllm_xargs": {"samplr": "topk"}}, "vllm_xargs.samplr"),
        ({"vllm_xargs": {"anything": 1}}, "vllm_xargs.anything"),
        ({"vllm_xargs": {"seed": 5}, "seed": 6}, "vllm_xargs.seed"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_nested_fields_are_named(server: Running, path: str, fields: dict[str, Any], param: str) -> None:
    error = error_of(server.post(path, RIGHT[path] | fields), 400)
    assert error["param"] == param and param in error["message"]


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"a": None, "b": False, "c": "x"}}, "chat_template_kwargs.c"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {}}, None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, None),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages.0.prefix"),
        ({"messages": [{"role": "user", "content": "a", "prefix": False}]}, None),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": "a", "contnet": "b"}]}, "messages.0.contnet"),
        ({"messages": [{"role": "user", "content": "a", "id": 5, "timestamp": 7, "weight": 1}]}, None),
    ],
)
def test_fields_of_messages_and_templates(
    server: Running, path: str, fields: dict[str, Any], param: str | None
) -> None:
    right = RIGHT[CHAT] if path == CHAT else {"messages": RIGHT[CHAT]["messages"]}
    answer = server.post(path, right | fields)
    if param is None:
        assert answer.status_code == 200, answer.text
    else:
        assert error_of(answer, 400)["param"] == param


# What the requests of other servers have, by their own sources.
VLLM = """
use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
prompt_logprobs logprob_token_ids allowed_token_ids bad_words structured_outputs priority request_id session_id
return_tokens_as_token_ids return_token_ids return_token_offsets mm_payload return_mm_kwargs cache_salt
kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget stream_interval
prompt_embeds logits_processors guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
guided_whitespace_pattern structural_tag
"""
VLLM_CHAT = """
include_reasoning echo add_generation_prompt continue_final_message documents chat_template media_io_kwargs
mm_processor_kwargs return_prompt_text reasoning_effort
"""
SGLANG = """
json_schema regex ebnf stop_regex no_stop_trim lora_path session_params custom_params custom_logit_processor
return_hidden_states return_routed_experts return_cached_tokens_details bootstrap_host bootstrap_port bootstrap_room
routed_dp_rank disagg_prefill_dp_rank data_parallel_rank rid extra_key custom_labels separate_reasoning
stream_reasoning max_new_tokens min_new_tokens sampling_seed input_ids input_embeds image_data return_logprob
top_logprobs_num logprob_start_len token_ids_logprob return_text_in_logprobs
"""
LLAMA_CPP = """
cache_prompt return_tokens return_progress n_predict n_indent n_keep n_discard n_cmpl n_cache_reuse t_max_predict_ms
response_fields top_n_sigma xtc_probability xtc_threshold typical_p dynatemp_range dynatemp_exponent repeat_last_n
repeat_penalty dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat
mirostat_tau mirostat_eta adaptive_target adaptive_decay n_probs min_keep post_sampling_probs grammar grammar_lazy
grammar_triggers reasoning_format thinking_forced_open samplers timings_per_token id_slot lora
reasoning_budget_tokens
"""
OTHERS = """
inputs parameters best_of decoder_input_details details do_sample return_full_text truncate watermark adapter_id
top_n_tokens format options keep_alive raw template system images context think
num_beams early_stopping penalty_alpha encoder_repetition_penalty bad_words_ids eos_token_id max_length min_length
max_time epsilon_cutoff eta_cutoff guidance_scale negative_prompt ban_eos_token temperature_last stopping_strings
"""


def unknown(cls: type[ChatBody] | type[CompletionBody], names: list[str]) -> set[str]:
    """Those of the names that are neither fields, nor refused, nor harmless knowingly."""
    return set(names) - set(cls.model_fields) - set(REFUSED[cls]) - set(HARMLESS) - {"chat_template_kwargs"}


def test_every_field_of_other_servers_has_been_thought_of() -> None:
    shared = f"{VLLM} {SGLANG} {LLAMA_CPP} {OTHERS}".split()
    assert unknown(CompletionBody, shared) == set()
    assert unknown(ChatBody, shared + VLLM_CHAT.split()) == set()


def test_every_field_of_openai_has_been_thought_of() -> None:
    assert unknown(ChatBody, list(chat_params.CompletionCreateParamsBase.__annotations__)) == set()
    assert unknown(CompletionBody, list(completion_params.CompletionCreateParamsBase.__annotations__)) == set()


def test_fields_of_the_other_route_are_refused() -> None:
    assert unknown(CompletionBody, list(ChatBody.model_fields)) == set()
    assert unknown(ChatBody, list(CompletionBody.model_fields)) == set()


def test_no_field_is_both_refused_and_let_through() -> None:
    for refused in REFUSED.values():
        assert not refused.keys() & HARMLESS.keys()


@pytest.mark.parametrize(
    "body",
    [
        {"block_lenght": "x" * 5000},
        {"regex": "x" * 5000},
        {"max_new_tokens": 10**3000},
        {"stop": ["x" * 5000]},
        {"temperature": "x" * 5000},
        {"sampler": "x" * 5000},
        {"model": "x" * 5000},
        {"sampler_params": {"x" * 5000: 1}},
        {"vllm_xargs": {"x" * 5000: 1}},
        {"vllm_xargs": {"sampler": "x" * 5000}},
        {"cache": "x" * 5000},
        {"prompt": {"x" * 5000: 1}},
        {"sampler": "policy", "sampler_params": {"policy": "x" * 5000}},
        {"messages": [{"role": "x" * 5000, "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 5000}]}]},
        {"chat_template_kwargs": {"x" * 5000: 1}},
        {"seed": 10**3000},
    ],
    ids=lambda body: str(body)[:40],
)
@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_errors_repeat_little_of_what_was_sent(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, RIGHT[path] | body)
    if answer.status_code == 200:  # that field is not one of this route
        assert path == COMPLETE and body.keys() <= {"messages", "chat_template_kwargs"}
        return
    error = error_of(answer, answer.status_code)
    assert max(len(run) for run in error["message"].split()) <= 210
    assert error["message"].count("x") + error["message"].count("0") < 260
    assert len(error["param"] or "") <= 210


def test_few_fields_may_be_unknown(server: Running) -> None:
    names = [f"{i}quite_{i}_another" for i in range(MAX_UNKNOWN + 1)]
    assert server.post(COMPLETE, RIGHT[COMPLETE] | dict.fromkeys(names[1:], 1)).status_code == 200
    error = error_of(server.post(COMPLETE, RIGHT[COMPLETE] | dict.fromkeys(names, 1)), 400)
    assert error["code"] == "unknown_parameter" and error["param"] == "body"


def test_many_unknown_fields_take_no_time(server: Running) -> None:
    began = time.process_time()  # of the server's threads too, and none of what else is busy
    body = RIGHT[COMPLETE] | {f"block_len{i}": i for i in range(50_000)}
    assert error_of(server.post(COMPLETE, body), 400)
    assert time.process_time() - began < 5
    messages = [{"role": "user", "content": "a", f"contend{i}": 1} for i in range(2000)]
    assert error_of(server.http.post(CHAT, content=json.dumps({"messages": messages})), 400)
    assert time.process_time() - began < 10
