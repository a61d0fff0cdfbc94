"""A block-causal model of experts over HTTP: its defaults, its exact cache, samplers, and what it cannot do."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.api.models import needs_torch_engine
from tests.api.serving import PROMPT, Running, error_of, serving
from tests.tiny_moe import ROLE_END, llada2_config, write_model

pytestmark = needs_torch_engine

RULES: list[dict[str, Any]] = [
    {"sampler": "topk", "sampler_params": {"k": 2}},
    {"sampler": "threshold", "sampler_params": {"threshold": 0.6}},
    {"sampler": "edit", "sampler_params": {"threshold": 0.5, "edit_threshold": 0.5, "k": 2, "max_post_steps": 4}},
    {"sampler": "random", "seed": 3},
    {"sampler": "entropy_bound"},
    {"sampler": "topk", "temperature": 0.8, "seed": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llada2", llada2_config())


@pytest.fixture(scope="module")
def llada2(folder: Path) -> Iterator[Running]:
    with serving(folder) as running:
        yield running


def test_the_defaults_are_the_models(llada2: Running) -> None:
    answer = llada2.complete(max_tokens=40, ignore_eos=True)
    assert answer["unmask"]["block_length"] == 32 and answer["unmask"]["cache"] == "prefix"
    assert answer["usage"]["completion_tokens"] == 40
    assert llada2.complete(max_tokens=40, ignore_eos=True, block_length=None)["unmask"]["block_length"] == 32


@pytest.mark.parametrize("rule", RULES)
def test_samplers_give_the_same_with_the_exact_cache(llada2: Running, rule: dict[str, Any]) -> None:
    fields = {"max_tokens": 30, "block_length": 8, "return_trajectory": True, **rule}
    answers = [llada2.complete(cache=cache, **fields) for cache in ("none", "prefix", "dual")]
    assert [answer["unmask"]["cache"] for answer in answers] == ["none", "prefix", "dual"]
    told = []
    for answer in answers:
        (choice,) = answer["choices"]
        # Confidences are rounded differently where a forward spans fewer positions.
        steps = [(step["forward"], step["positions"], step["tokens"]) for step in choice["trajectory"]]
        told.append((choice["text"], choice["finish_reason"], steps, answer["usage"]))
    assert told[0] == told[1] == told[2]


def test_blocks_of_another_length_are_another_model(llada2: Running) -> None:
    texts = {
        llada2.complete(max_tokens=40, block_length=length, ignore_eos=True)["choices"][0]["text"]
        for length in (1, 4, 32)
    }
    assert len(texts) == 3


def test_a_stream_is_the_text(llada2: Running) -> None:
    for rule in RULES:
        fields = {"prompt": PROMPT, "max_tokens": 30, "block_length": 8, **rule}
        whole = llada2.complete(**fields)["choices"][0]["text"]
        answer = llada2.post("/v1/completions", {**fields, "stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == whole


def test_the_checkpoints_chat_template_is_used(llada2: Running) -> None:
    messages = [{"role": "user", "content": "How many apples?"}]
    answer = llada2.post("/v1/chat/completions", {"messages": messages, "max_tokens": 12, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    prompt = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>How many apples?<|role_end|>"
    expected = llada2.text.encode(prompt + "<role>ASSISTANT</role>")
    assert answer.json()["usage"]["prompt_tokens"] == len(expected)
    assert llada2.gate.seen[-1] == expected


def test_a_suffix_is_refused(llada2: Running) -> None:
    body = {"prompt": PROMPT, "suffix": " more", "max_tokens": 8}
    error = error_of(llada2.post("/v1/completions", body), 400)
    assert error["param"] == "suffix" and "cannot see what comes after" in error["message"]


def test_the_end_of_a_role_ends_the_text(tmp_path: Path) -> None:
    """A model that knows two tokens: that one, and another wherever the output for it is negative."""
    model = write_model(tmp_path / "model", llada2_config(eos_token_id=2))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:-1] = 0
    save_file(tensors, model / "model.safetensors")
    with serving(model) as running:
        assert running.text.token_id(ROLE_END) == running.engine.info.vocab_size - 1
        answer = running.complete(max_tokens=40, block_length=8)
        whole = running.complete(max_tokens=40, block_length=8, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "stop" and whole["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] < 40 == whole["usage"]["completion_tokens"]
    assert ROLE_END not in answer["choices"][0]["text"]
