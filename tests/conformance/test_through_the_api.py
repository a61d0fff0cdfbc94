"""What the originals answered, asked for over HTTP with the recordings' own parameters."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from tests.api.models import needs_torch_engine
from tests.api.serving import Running, serving
from tests.conformance.requests import Asked, NotExpressible, Tokens, express
from tests.conformance.test_conformance import FIXTURES, needs_fixtures
from tests.fuzz.judging import apply, prefix
from tests.fuzz.servers import one_thread

pytestmark = [needs_torch_engine, needs_fixtures]

FAMILIES = ("llada", "llada_moe", "llada2", "dream", "sdar", "fast_dllm_v2", "dinfer")


def recorded(family: str) -> list[dict[str, Any]]:
    """The cases of a family, with what its file says of all of them."""
    path = FIXTURES / family / "cases.json"
    whole = json.loads(path.read_text()) if path.is_file() else {"cases": []}
    return [{"eos_id": whole.get("eos_id"), **case} for case in whole["cases"]]


CASES = [pytest.param(family, case, id=f"{family}-{case['name']}") for family in FAMILIES for case in recorded(family)]


class Servers:
    """A server of each checkpoint, with a tokenizer whose tokens are numbers."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running: dict[str, Running] = {}

    def of(self, family: str, **settings: Any) -> Running:
        key = f"{family} {settings}"
        if key not in self._running:
            folder = self._write(family, settings, f"{family}-{len(self._running)}")
            self._running[key] = self._stack.enter_context(serving(folder, sampler=None))
        return self._running[key]

    def _write(self, family: str, settings: dict[str, Any], name: str) -> Path:
        whole = json.loads((FIXTURES / family / "cases.json").read_text())
        source = (FIXTURES / family / whole.get("checkpoint", "checkpoint")).resolve()
        folder = self._folder / name
        folder.mkdir()
        config = json.loads((source / "config.json").read_text())
        vocabulary = config.get("text_config", config)["vocab_size"]
        tokens = {f"<{i}>": i for i in range(vocabulary)}
        Tokenizer(models.WordLevel(tokens, unk_token="<0>")).save(str(folder / "tokenizer.json"))
        settings = {"mask_token_id": whole["mask_id"], **settings} if "mask_id" in whole else settings
        (folder / "config.json").write_text(json.dumps(config | settings))
        (folder / "model.safetensors").symlink_to(source / "model.safetensors")
        return folder


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        stack.enter_context(one_thread())
        yield Servers(tmp_path_factory.mktemp("recorded"), stack)


def answered(running: Running, body: dict[str, Any]) -> tuple[list[Tokens], dict[str, Any]]:
    """The tokens of each choice's text, the one that ends it included, and the answer."""
    answer = running.complete(**body)
    texts = []
    for choice in answer["choices"]:
        canvas: dict[int, int] = {}
        for each in choice["trajectory"]:
            apply(canvas, each)
        ends = set(body["stop_token_ids"])
        tokens = prefix(canvas, body["max_tokens"], ends)
        texts.append(tokens + ([canvas[len(tokens)]] if choice["finish_reason"] == "stop" else []))
    return texts, answer


@pytest.mark.parametrize(("family", "case"), CASES)
def test_the_answer_is_the_originals(servers: Servers, family: str, case: dict[str, Any]) -> None:
    try:
        asked: Asked = express(family, case)
    except NotExpressible as reason:
        pytest.skip(str(reason))
    texts, answer = answered(servers.of(family, **asked.settings), asked.body)
    if asked.whole:
        assert texts == asked.outputs
        assert answer["usage"]["completion_tokens"] == sum(len(output) for output in asked.outputs)
        return
    for text, output in zip(texts, asked.outputs, strict=True):
        assert text[: len(output)] == output[: len(text)]
        ended = output[-1] in asked.body["stop_token_ids"]
        assert len(text) == (len(output) if ended else asked.body["max_tokens"])


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in recorded("diffusion_gemma")])
def test_a_canvas_is_denoised_whole(servers: Servers, case: dict[str, Any]) -> None:
    """DiffusionGemma draws everything at random, but for how much: a shorter text is the beginning of a longer one."""
    params, running = case["params"], servers.of("diffusion_gemma")
    names = ("t_min", "t_max", "max_denoising_steps", "stability_threshold", "confidence_threshold")
    chosen = {name: params[name] for name in names} | {"entropy_bound": params["sampler_config"]["entropy_bound"]}
    prompt = case["prompt"][0][(case["attention_mask"] or [[1]])[0].index(1) :]
    length, most = 16, params["max_new_tokens"]
    body = {
        "prompt": prompt,
        "sampler_params": chosen,
        "seed": case["manual_seed"],
        "ignore_eos": True,
        "stop_token_ids": [],
        "return_trajectory": True,
    }
    whole = -(-most // length) * length
    (expected,), answer = answered(running, body | {"max_tokens": whole})
    assert len(expected) == whole
    forwards = answer["usage"]["completion_tokens_details"]["forward_passes"]
    for shorter in (1, 3, most - 5, most):
        (found,), answer = answered(running, body | {"max_tokens": shorter})
        assert found == expected[:shorter]
        if shorter > whole - length:
            assert answer["usage"]["completion_tokens_details"]["forward_passes"] == forwards


@pytest.mark.parametrize("family", ["sdar", "llada2", "fast_dllm_v2"])
def test_a_threshold_of_one_is_never_passed(servers: Servers, family: str) -> None:
    """These families' programs commit what is surer than the threshold, and one token where nothing is."""
    body = {
        "prompt": list(range(5, 21)),
        "max_tokens": 16,
        "block_length": 4,
        "temperature": 1,
        "top_k": 1,  # after which every token is as sure as can be
        "sampler": "threshold",
        "ignore_eos": True,
        "stop_token_ids": [],
        "return_trajectory": True,
    }
    forwards = []
    for threshold in (1.0, 0.9):
        (text,), answer = answered(servers.of(family), body | {"sampler_params": {"threshold": threshold}})
        assert len(text) == 16
        forwards.append(answer["usage"]["completion_tokens_details"]["forward_passes"])
    assert forwards[0] == 16 > forwards[1]
