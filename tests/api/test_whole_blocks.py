"""Families that write block by block denoise whole blocks and cut the text: over HTTP, with odd lengths."""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_moe
from tests.api.models import needs_torch_engine
from tests.api.serving import PROMPT, Running, error_of, serving
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.tiny_dream import write_tiny_dream
from tests.tiny_gemma import write_tiny_gemma

pytestmark = needs_torch_engine

Write = Callable[[Path], Path]
BLOCKS: dict[str, Write] = {
    "sdar": lambda folder: write_decoder(folder, SDAR),
    "sdar_moe": lambda folder: write_decoder(folder, SDAR_MOE),
    "fast_dllm_v2": lambda folder: write_decoder(folder, FAST_DLLM),
    "llada2": lambda folder: tiny_moe.write_model(folder, tiny_moe.llada2_config()),
    "diffusion_gemma": write_tiny_gemma,
}


@pytest.fixture(scope="module", params=BLOCKS)
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(BLOCKS[request.param](tmp_path_factory.mktemp("models") / "model"), sampler=None) as running:
        yield running


def tokens(running: Running, **fields: Any) -> list[int]:
    """Token ids of a text, put together from its trajectory."""
    answer = running.complete(return_trajectory=True, ignore_eos=True, seed=5, **fields)
    canvas: dict[int, int] = {}
    for each in answer["choices"][0]["trajectory"]:
        canvas |= dict(zip(each["positions"], each["tokens"], strict=True))
        for position in each.get("remasked", []):
            canvas.pop(position)
    count = answer["usage"]["completion_tokens"]
    assert count == fields["max_tokens"]
    return [canvas[position] for position in range(count)]


def side_by_side(check: Callable[..., None], arguments: Iterable[tuple[Any, ...]], at_once: int = 16) -> None:
    """Many checks at once, which share forwards and so take less time than one after the other."""
    with ThreadPoolExecutor(at_once) as pool:
        for done in [pool.submit(check, *each) for each in arguments]:
            done.result()


def samplers(running: Running) -> list[str]:
    cards = running.get("/v1/samplers").json()["data"]
    return [card["id"] for card in cards if card["kind"] == "sampler" and card["available"] and card["id"] != "policy"]


def test_a_short_text_is_how_a_long_one_begins(blocks: Running) -> None:
    """Whatever the sampler, and wherever the prompt ends within a block. Dream's rule counts steps in all."""

    def check(sampler: str, prompt: str) -> None:
        fields: dict[str, Any] = {"sampler": sampler, "prompt": prompt}
        long = tokens(blocks, max_tokens=24, **fields)
        for length in (1, 3, 17):
            assert tokens(blocks, max_tokens=length, **fields) == long[:length], (sampler, prompt, length)

    names = [sampler for sampler in samplers(blocks) if sampler != "dream"]
    every = list(zip(names, cycle([PROMPT, PROMPT[:9]]), strict=False))
    # A random model that drafts amplifies the last bits of sums, which differ with who shares a forward.
    side_by_side(check, every, at_once=1 if blocks.engine.info.pattern.noise else 16)


def test_an_end_of_text_beyond_the_text_does_not_end_it(blocks: Running) -> None:
    long = tokens(blocks, max_tokens=12)
    beyond = sorted(set(long[6:]) - set(long[:6]))
    assert beyond
    answer = blocks.complete(max_tokens=6, seed=5, ignore_eos=True, stop_token_ids=beyond, fill_after_end=False)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 6


def test_where_the_context_ends_within_a_block_it_says_so(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "sdar", SDAR)
    with serving(folder, max_model_len=30) as running:
        prompt = [5] * 10  # blocks of 4: the last whole one ends at 28
        assert "warnings" not in running.complete(prompt=prompt, max_tokens=17)["unmask"]
        answer = running.complete(prompt=prompt, max_tokens=20, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 20
        (warning,) = answer["unmask"]["warnings"]
        assert "the context's 30 tokens (--max-model-len), 2 short of a whole one" in warning
        error = error_of(running.post("/v1/completions", {"prompt": prompt, "max_tokens": 21}), 400)
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith("This model's maximum context length is 30 tokens here, because of --max-mo")
    with serving(folder, max_batch_tokens=24) as running:
        error = error_of(running.post("/v1/completions", {"prompt": prompt, "max_tokens": 21}), 400)
        assert "maximum context length is 24 tokens here, because of --max-batch-tokens" in error["message"]
        assert "31 tokens (10 in the prompt, 21 in the completion)" in error["message"]
        assert error["code"] == "context_length_exceeded" and error["code"] in error["message"]


@pytest.fixture(scope="module", params=["dream", "fast_dllm_v2"])
def shifted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Models whose outputs are about the next position."""
    folder = tmp_path_factory.mktemp("models") / request.param
    write: Write = write_tiny_dream if request.param == "dream" else BLOCKS["fast_dllm_v2"]
    with serving(write(folder)) as running:
        yield running


@pytest.mark.parametrize("sampler", ["hierarchy_remask", "edit"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_revising_rules_where_a_blocks_first_position_is_decided_from_outside(
    shifted: Running, sampler: str, cache: str
) -> None:
    """A block may hold that position only, or have it decided before all others; no text that was told changes."""
    params: list[dict[str, Any]] = [{}, {"threshold": 0.3}]
    params.append({"remask_below": 0.9} if sampler == "hierarchy_remask" else {"edit_threshold": 0.0})

    def check(block_length: int, length: int) -> None:
        fields: dict[str, Any] = {
            "sampler": sampler,
            "sampler_params": params[(length + block_length) % 3],
            "cache": cache,
            "block_length": block_length,
            "max_tokens": length,
            "ignore_eos": True,
            "prompt": [5 + i % 7 for i in range((1, 16, 9)[length % 3])],
        }
        whole = shifted.complete(**fields)
        assert whole["usage"]["completion_tokens"] == length, fields
        text = ""
        with shifted.http.stream("POST", "/v1/completions", json=fields | {"stream": True}) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
        assert text == whole["choices"][0]["text"], fields

    side_by_side(check, product((1, 2, 4, 8), (1, 2, 5, 17, 33)))
    assert shifted.get("/health").status_code == 200


def test_usage_with_a_stop_counts_to_the_token_that_completes_it(shifted: Running) -> None:
    """The same however many tokens a forward settles, streamed or whole."""
    plain = shifted.complete(max_tokens=32, ignore_eos=True, block_length=1, return_trajectory=True)
    text = plain["choices"][0]["text"]
    stop = next(text[i : i + 3] for i in range(9, len(text)) if "\ufffd" not in text[i : i + 3])
    fields: dict[str, Any] = {"max_tokens": 32, "ignore_eos": True, "block_length": 1, "stop": [stop]}
    ids = [token for each in plain["choices"][0]["trajectory"] for token in each["tokens"]]
    count = next(n for n in range(len(ids)) if stop in shifted.text.decode(ids[:n]))
    whole = shifted.complete(**fields)
    assert whole["usage"]["completion_tokens"] == count
    assert whole["usage"]["completion_tokens_details"]["forward_passes"] == count, "one position a forward, and no more"
    with shifted.http.stream(
        "POST",
        "/v1/completions",
        json=fields | {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}},
    ) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert lines[-1]["usage"] == whole["usage"]
    assert "".join(choice["text"] for line in lines for choice in line["choices"]) == whole["choices"][0]["text"]
