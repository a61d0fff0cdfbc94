"""Block-causal models over HTTP: what is theirs by default, and what they cannot do."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.api.models import needs_torch_engine
from tests.api.serving import PROMPT, Running, error_of, serving
from tests.decoders import FAST_DLLM, SDAR, write_decoder

pytestmark = needs_torch_engine

SAMPLERS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"k": 2}),
    ("threshold", {"threshold": 0.4}),
    ("sequential", {}),
    ("edit", {"threshold": 0.4}),
]


@pytest.fixture(scope="module")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_decoder(tmp_path_factory.mktemp("models") / "sdar", SDAR)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 9], "temperature": 0.6}))
    with serving(folder) as running:
        yield running


@pytest.fixture(scope="module")
def fast_dllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(write_decoder(tmp_path_factory.mktemp("models") / "v2", FAST_DLLM)) as running:
        yield running


def streamed(running: Running, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text put together, and the last chunk."""
    text, last = "", {}
    with running.http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True} | fields) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                last = json.loads(line[6:])
                text += "".join(choice["text"] for choice in last["choices"])
    return text, last


@pytest.mark.parametrize(("sampler", "params"), SAMPLERS)
def test_samplers_and_streaming(sdar: Running, fast_dllm: Running, sampler: str, params: dict[str, Any]) -> None:
    """In one go or streamed, with the exact cache or without one: the same text in as many forwards."""
    fields = {"sampler": sampler, "sampler_params": params, "max_tokens": 22, "ignore_eos": True}
    for running in (sdar, fast_dllm):
        whole = running.complete(**fields)
        text = whole["choices"][0]["text"]
        assert text and streamed(running, **fields)[0] == text
        exact = running.complete(cache="none", **fields)
        assert exact["choices"][0]["text"] == text and exact["usage"] == whole["usage"]
        assert whole["usage"]["completion_tokens"] == 22


def test_what_the_model_says_is_the_default(sdar: Running, fast_dllm: Running) -> None:
    for running, block_length in ((sdar, 4), (fast_dllm, 8)):
        used = running.complete()["unmask"]
        assert (used["block_length"], used["cache"]) == (block_length, "prefix")
        assert running.complete(block_length=None)["unmask"]["block_length"] == block_length
    assert sdar.complete(block_length=6, cache="dual")["unmask"]["block_length"] == 6


def test_tokens_that_end_a_text_come_from_both_files_and_by_name(sdar: Running, fast_dllm: Running) -> None:
    name = sdar.text.token_id("<|im_end|>")
    assert sdar.engine.info.end_ids == {1, 9, name}
    assert fast_dllm.engine.info.end_ids == {1, name}


def test_a_block_that_the_model_cannot_have(fast_dllm: Running) -> None:
    for block_length in (3, 5, 32):
        fields = {"prompt": PROMPT, "block_length": block_length}
        error = error_of(fast_dllm.post("/v1/completions", fields), 400)
        assert error["param"] == "block_length"
        assert f"block_length {block_length} does not divide the model's blocks of 16" in error["message"]


def test_no_text_after_the_generation(sdar: Running, fast_dllm: Running) -> None:
    for running in (sdar, fast_dllm):
        error = error_of(running.post("/v1/completions", {"prompt": PROMPT, "suffix": " apples"}), 400)
        assert error["param"] == "suffix"
        assert "cannot see what comes after" in error["message"]


def test_a_chat(sdar: Running) -> None:
    body = {"messages": [{"role": "user", "content": "How many apples?"}], "max_tokens": 9}
    answer = sdar.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["unmask"]["block_length"] == 4
    assert answer.json()["choices"][0]["message"]["content"]
