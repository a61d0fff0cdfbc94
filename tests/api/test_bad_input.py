"""Whatever comes in: 400, OpenAI's shape, the field's name; never a 5xx."""

import codecs
import gzip
import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.serving import PROMPT, Running, error_of

LONG = 10**400
CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"

WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": LONG}, "max_tokens"),
    ({"max_tokens": 257}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": [0]}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": LONG}, "top_k"),
    ({"top_k": False}, "top_k"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": LONG}, "n"),
    ({"stop": ""}, "stop.0"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": {}}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop.0"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"stop_token_ids": "a"}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": 3}, "stream_options"),
    ({"block_length": 0}, "block_length"),
    ({"block_length": LONG}, "block_length"),
    ({"block_length": "8"}, "block_length"),
    ({"fill_after_end": "no"}, "fill_after_end"),
    ({"return_trajectory": 1}, "return_trajectory"),
    ({"cache": "always"}, "cache"),
    ({"cache": True}, "cache"),
    ({"sampler": "credit", "temperature": 0.5}, "temperature"),
    ({"sampler": "edit", "sampler_params": {"edit_threshold": 2}}, "sampler_params.edit_threshold"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"min_p": 0.1}, "min_p"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]
WRONG_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt.0"),
    ({"prompt": ["a", 3]}, "prompt.1"),
    ({"prompt": [3, "a"]}, "prompt.1"),
    ({"prompt": [[3], "a"]}, "prompt.1"),
    ({"prompt": [[3], ["a"]]}, "prompt.1.0"),
    ({"prompt": [3, -1]}, "prompt.1"),
    ({"prompt": [3, True]}, "prompt.1"),
    ({"prompt": [3, 10**6]}, "prompt"),
    ({"prompt": [2**70]}, "prompt.0"),
    ({"prompt": ["a"] * 300}, "prompt"),
    ({"suffix": 3}, "suffix"),
    ({"echo": "x"}, "echo"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 0, "echo": True}, "logprobs"),
    ({"best_of": 2}, "best_of"),
]
MESSAGE = {"role": "user", "content": "Hello"}
WRONG_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": [3]}, "messages.0"),
    ({"messages": [MESSAGE, {"role": "user"}]}, "messages.1.content"),
    ({"messages": [{"content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        "messages.0.content.1.type",
    ),
    ({"messages": [MESSAGE, {"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "messages.1.tool_calls"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 3}, "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"suffix": "a"}, "suffix"),
]
CASES = [(COMPLETE, fields, param) for fields, param in WRONG_FIELDS + WRONG_COMPLETIONS]
CASES += [(CHAT, fields, param) for fields, param in WRONG_FIELDS + WRONG_CHATS]


@pytest.mark.parametrize(("path", "fields", "param"), CASES, ids=lambda value: str(value)[:40])
def test_a_wrong_field_is_named(server: Running, path: str, fields: dict[str, Any], param: str) -> None:
    right = {"prompt": PROMPT} if path == COMPLETE else {"messages": [MESSAGE]}
    began = time.process_time()  # of the server's threads too, and none of what else is busy
    error = error_of(server.post(path, right | fields), 400)
    seconds = time.process_time() - began
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[-1] in error["message"] or param[-1].isdigit()
    assert len(error["message"]) < 500
    assert seconds < 2  # 50 ms on a machine that has nothing else to do


def test_nothing_of_that_reached_the_model(server: Running) -> None:
    before = server.gate.forwards
    for path, fields, _ in CASES[::7]:
        right = {"prompt": PROMPT} if path == COMPLETE else {"messages": [MESSAGE]}
        server.post(path, right | fields)
    assert server.gate.forwards == before


@pytest.mark.parametrize(("path", "param"), [(COMPLETE, "prompt"), (CHAT, "messages"), ("/detokenize", "tokens")])
def test_a_missing_field_is_named(server: Running, path: str, param: str) -> None:
    error = error_of(server.post(path, {}), 400)
    assert (error["param"], error["code"]) == (param, "missing_required_parameter")


@pytest.mark.parametrize("path", [COMPLETE, CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"prompt": "a"',
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b'{"prompt": "\xc3"}',
        b'{"prompt": "\\ud800", "messages": "\\ud800", "tokens": "\\ud800"}',
        b"1" * 5000,
        b'{"max_tokens": 1' + b"0" * 5000 + b"}",
        b"null",
        b"[]",
        b'"text"',
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_json_object_is_refused(server: Running, path: str, body: bytes) -> None:
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["param"] == "body"


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (codecs.BOM_UTF8, "BOM"),
        (codecs.BOM_UTF16_LE, "BOM"),
        (codecs.BOM_UTF16_BE, "BOM"),
        (codecs.BOM_UTF32_LE, "BOM"),
        (codecs.BOM_UTF32_BE, "BOM"),
        (b"\x1f\x8b\x08", "gzip"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETE, CHAT, "/tokenize"])
def test_a_body_in_another_form_is_told_which(server: Running, path: str, start: bytes, said: str) -> None:
    body = start + json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
    error = error_of(answer, 400)
    assert error["param"] == "body" and said in error["message"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_other_encodings_of_text_are_named(server: Running, encoding: str) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode(encoding)
    answer = server.http.post(COMPLETE, content=body, headers={"content-type": "application/json"})
    assert "UTF-8" in error_of(answer, 400)["message"]


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_a_compressed_body_is_refused_by_name(server: Running, coding: str) -> None:
    body = gzip.compress(json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode())
    headers = {"content-type": "application/json", "content-encoding": coding}
    answer = server.http.post(COMPLETE, content=body, headers=headers)
    error = error_of(answer, 415)
    assert "content-encoding" in error["message"] and coding.lower().removeprefix("identity, ") in error["message"]
    assert answer.headers["accept-encoding"] == "identity"


def test_no_compression_is_no_compression(server: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1})
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    assert server.http.post(COMPLETE, content=body, headers=headers).status_code == 200


def test_other_content_types_are_refused(server: Running) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1})
    for kind, status in (
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
    ):
        answer = server.http.post(COMPLETE, content=body, headers={"content-type": kind})
        assert answer.status_code == status
    assert server.http.post(COMPLETE, content=body).status_code == 200


@pytest.mark.parametrize("prompt", ["apples " * 300, [5] * 256, [5] * 3000, ["a", "apples " * 300]])
def test_a_prompt_that_is_too_long(server: Running, prompt: Any) -> None:
    error = error_of(server.post(COMPLETE, {"prompt": prompt}), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert "256" in error["message"]


def test_a_region_that_is_too_long(server: Running) -> None:
    error = error_of(server.post(COMPLETE, {"prompt": [5] * 200, "max_tokens": 57}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    assert server.complete(prompt=[5] * 200, max_tokens=56, sampler_params={"k": 56})["usage"]["total_tokens"] == 256


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({name for fields, _ in WRONG_FIELDS + WRONG_COMPLETIONS + WRONG_CHATS for name in fields})
BODIES = st.fixed_dictionaries(
    {"max_tokens": st.just(2) | JSON},
    optional={name: JSON for name in [*NAMES, "sampler", "sampler_params", "vllm_xargs"] if name != "max_tokens"},
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(body=BODIES, path=st.sampled_from([COMPLETE, CHAT, "/tokenize", "/detokenize"]))
def test_no_body_makes_the_server_fail(server: Running, body: dict[str, Any], path: str) -> None:
    content = json.dumps({"prompt": "a", "messages": [MESSAGE], "tokens": [5]} | body)
    answer = server.http.post(path, content=content, headers={"content-type": "application/json"})
    if answer.status_code != 200:
        error_of(answer, answer.status_code)
    assert answer.status_code in (200, 400, 404)
