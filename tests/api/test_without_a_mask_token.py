"""A model without a mask token behind every route: its own sampler, whole blocks at a time, and what it refuses."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import pytest

from samplers import Canvas, get_sampler, list_samplers
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.api.sampler_choice import default_sampler
from server.backends.loading import load_model
from server.engine import RequestError
from server.settings import load_settings
from tests.api.models import needs_torch_engine
from tests.api.serving import NAME, PROMPT, Running, error_of, serving, until
from tests.tiny_gemma import CANVAS, write_tiny_gemma

pytestmark = needs_torch_engine

LONG = {"max_tokens": 20, "sampler_params": {"max_denoising_steps": 5}, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.fixture(scope="module")
def gemma(folder: Path) -> Iterator[Running]:
    """A server that was told of no sampler."""
    with serving(folder, sampler=None) as running:
        yield running


def test_a_completion_is_what_the_loop_alone_writes(gemma: Running, folder: Path) -> None:
    """Text, tokens and forwards of the loop on a backend of its own, without a server or a cache."""
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    sampler = get_sampler("diffusion_gemma")
    canvas = Canvas.blank(loaded.text.encode(PROMPT), 20, None, pattern=loaded.backend.info.pattern)
    row = Row(canvas, sampler, sampler.Params(max_denoising_steps=5), seed=7)
    finish([row], loaded.backend.predict)
    answer = gemma.complete(seed=7, **LONG)
    assert answer["choices"][0]["text"] == loaded.text.decode(row.text_tokens())
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["usage"]["completion_tokens_details"]["forward_passes"] == row.forwards <= 15
    used = answer["unmask"]
    assert (used["sampler"], used["block_length"], used["cache"]) == ("diffusion_gemma", CANVAS, "prefix")


def test_the_defaults_are_the_models_own(gemma: Running) -> None:
    params = gemma.complete(max_tokens=8)["unmask"]["sampler_params"]
    assert params == {
        "entropy_bound": 0.1,
        "t_min": 0.4,
        "t_max": 0.8,
        "max_denoising_steps": 48,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
    }


def test_seeds(gemma: Running) -> None:
    """The same alone, again, in a batch, and whatever is kept; another seed is another text."""

    def text(**fields: Any) -> list[str]:
        return [choice["text"] for choice in gemma.complete(**LONG | fields)["choices"]]

    alone = [text(seed=seed)[0] for seed in (3, 4, 5)]
    assert text(seed=3, n=3) == alone
    assert text(seed=3, cache="none") == alone[:1]
    assert len(set(alone)) == 3


def test_a_stream_sends_whole_blocks(gemma: Running) -> None:
    whole = gemma.complete(seed=7, **LONG)["choices"][0]["text"]
    with gemma.client() as client:
        chunks: Any = list(
            client.completions.create(
                model=NAME, prompt=PROMPT, max_tokens=20, seed=7, stream=True, logprobs=0, extra_body=LONG
            )
        )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].text]
    assert "".join(choice.text for choice in told) == whole
    ends = list(accumulate(len(choice.logprobs.tokens) for choice in told if choice.logprobs))
    assert {8, 16} <= set(ends) and ends[-1] == 20, "a character may be held back to the end, but no block is split"


def test_a_chat_streams(gemma: Running) -> None:
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "seed": 1, "extra_body": LONG}
    with gemma.client() as client:
        chunks: Any = list(client.chat.completions.create(model=NAME, stream=True, **ask))
        whole: Any = client.chat.completions.create(model=NAME, **ask)
    assert chunks[-1].choices[0].finish_reason == "length"
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(texts) == whole.choices[0].message.content
    assert len(texts) <= 4, "one a block, and what was held back of a character to the end"


def test_the_trajectory_has_drafts_and_then_what_was_committed(gemma: Running) -> None:
    choice = gemma.complete(seed=7, return_trajectory=True, **LONG)["choices"][0]
    passes = choice["trajectory"]
    assert [each["forward"] for each in passes] == list(range(1, len(passes) + 1))
    committed = [each for each in passes if each["positions"]]
    assert [each["positions"] for each in committed] == [list(range(start, start + 8)) for start in (0, 8, 16)]
    for each in passes:
        drafted = each.get("draft", [])
        assert len(drafted) == len(each.get("draft_texts", []))
        assert bool(drafted) is not bool(each["positions"])
        assert len(drafted) + len(each["positions"]) == 8, "the last block is drafted as a whole, and cut"
        assert all(0 < confidence <= 1 for confidence in each["confidences"])


def test_metrics_count_forwards_and_tokens(gemma: Running) -> None:
    before = gemma.metrics()
    used = gemma.complete(seed=9, **LONG)["usage"]
    after = gemma.metrics()

    def more(name: str) -> float:
        key = (name, "diffusion_gemma")
        return after[key] - before.get(key, 0)

    assert more("dllm_generation_tokens_total") == 20
    assert more("dllm_forward_passes_total") == used["completion_tokens_details"]["forward_passes"]
    assert more("dllm_committed_tokens_per_step_sum") == 24, "whole blocks"


def test_an_end_of_text_ends_the_text(gemma: Running) -> None:
    """The last token of the second block as an end: the third is never begun."""
    whole = gemma.complete(seed=7, return_trajectory=True, **LONG)["choices"][0]["trajectory"]
    tokens = [token for each in whole for token in each["tokens"]]
    first = tokens.index(tokens[9])
    answer = gemma.complete(seed=7, stop_token_ids=[tokens[9]], **LONG)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == first + 1
    assert answer["usage"]["completion_tokens_details"]["forward_passes"] < len(whole)


def test_a_client_that_leaves_frees_its_row(gemma: Running) -> None:
    body = {"prompt": PROMPT, "stream": True, "return_trajectory": True, "max_tokens": 100, "block_length": 1}
    before = gemma.gate.forwards
    with gemma.gate.closed(), gemma.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        until(lambda: gemma.gauges() == (1, 0))
    until(lambda: gemma.gauges() == (0, 0))
    assert gemma.gate.forwards - before < 50, "100 blocks take at least 100"


@pytest.mark.parametrize("sampler", [s.name for s in list_samplers() if not s.drafts and s.name != "policy"])
def test_samplers_that_need_a_mask_token_are_refused(gemma: Running, sampler: str) -> None:
    for fields in ({"sampler": sampler}, {"model": f"{NAME}:{sampler}"}, {"vllm_xargs": {"sampler": sampler}}):
        error = error_of(gemma.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8} | fields), 400)
        assert error["param"] == "sampler" and "mask token" in error["message"]


def test_its_sampler_is_refused_for_models_with_a_mask_token(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 8, "sampler": "diffusion_gemma"}
    error = error_of(server.post("/v1/completions", body), 400)
    assert error["param"] == "sampler" and "without a mask token" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"suffix": " The end."}, "suffix", "comes after"),
        ({"temperature": 0.5}, "temperature", "chooses tokens itself"),
        ({"sampler_params": {"max_denoising_steps": 0}}, "sampler_params.max_denoising_steps", "greater than"),
        ({"sampler_params": {"t_max": 0}}, "sampler_params.t_max", "greater than 0"),
        ({"sampler_params": {"k": 2}}, "sampler_params.k", "no parameter"),
        ({"max_tokens": 1000}, "max_tokens", "maximum context length is 128"),
    ],
)
def test_other_refusals(gemma: Running, fields: dict[str, Any], param: str, said: str) -> None:
    error = error_of(gemma.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8} | fields), 400)
    assert error["param"] == param and said in error["message"]


@pytest.mark.parametrize(("length", "used"), [(3, 3), (None, CANVAS), (100, 100)])
def test_blocks_of_another_length(gemma: Running, length: int | None, used: int) -> None:
    answer = gemma.complete(block_length=length, return_trajectory=True, **LONG)
    assert answer["unmask"]["block_length"] == used
    first = next(each["positions"] for each in answer["choices"][0]["trajectory"] if each["positions"])
    assert first == list(range(used))


def test_the_catalogue_says_what_goes(gemma: Running) -> None:
    cards = {card["id"]: card for card in gemma.get("/v1/samplers").json()["data"] if card["kind"] == "sampler"}
    assert [name for name, card in cards.items() if card["available"]] == ["diffusion_gemma"]
    assert "no mask token" in cards["topk"]["reason"]
    assert [model["id"] for model in gemma.get("/v1/models").json()["data"]] == [NAME, f"{NAME}:diffusion_gemma"]


def test_a_server_with_a_sampler_that_does_not_fit_does_not_start(folder: Path) -> None:
    info = load_model(str(folder), device="cpu", dtype="float32").backend.info
    assert default_sampler(load_settings({}), info)[0].name == "diffusion_gemma"
    with pytest.raises(RequestError, match="no mask token") as caught:
        default_sampler(load_settings({"sampler": "topk"}), info)
    assert caught.value.field == "sampler"


def test_a_broken_model_fails_one_request_and_goes_on(gemma: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gemma.gate, "failure", MemoryError("no room"))
        answer: httpx.Response = gemma.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8})
        assert error_of(answer, 500)
    assert gemma.complete(max_tokens=8)["choices"][0]["finish_reason"] in ("stop", "length")
