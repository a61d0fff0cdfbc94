"""`unmask generate` and `unmask evaluate` with block-causal models, and their choice of a cache."""

from pathlib import Path
from typing import Any

import pytest

from samplers import CacheMode, Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import load_model
from tests.commands.application import read_json, refused, right
from tests.decoders import FAST_DLLM, SDAR, write_decoder

PROMPT = "Tom has 3 apples."
QUICK = ("--task", "sort", "--sampler", "topk:k=2", "--count", 2, "--gen-length", 10)


@pytest.fixture(scope="module", params=[SDAR, FAST_DLLM])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("models") / request.param, request.param)


def test_a_completion_of_the_models_own_blocks(model: Path) -> None:
    loaded = load_model(str(model))
    info = loaded.backend.info
    canvas = Canvas.blank(loaded.text.encode(PROMPT), 12, info.mask_id, info.block_length, pattern=info.pattern)
    topk = get_sampler("topk")
    row = Row(canvas, topk, topk.Params(), end_ids=info.end_ids)
    finish([row], loaded.backend.predict)
    common = ("generate", PROMPT, "--model", model, "--max-tokens", 12, "--sampler", "topk")
    for options in ((), ("--cache", "none"), ("--cache", "prefix"), ("--block-length", "full")):
        result = right(*common, *options)
        assert result.stdout == loaded.text.decode(row.text_tokens()) + "\n"
        assert result.stderr.startswith(f"{row.completion_tokens} tokens, {row.forwards} forwards, ")


def test_rows_say_block_and_cache(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    common = ("evaluate", "--model", model, *QUICK, "--json", file)
    shown = right(*common).stdout
    right(*common, "--cache", "none", "--block-length", 2)
    right(*common, "--cache", "none")
    rows: list[dict[str, Any]] = read_json(file)["rows"]
    own = 4 if model.name == SDAR else 8
    assert [(row["block_length"], row["cache"]) for row in rows] == [(own, "prefix"), (2, "none"), (own, "none")]
    assert f"{own}, prefix cache" in shown
    exact, full = rows[0], rows[2]
    assert all(exact[key] == full[key] for key in ("correct", "tokens", "forwards")), "exact in both"


def test_a_cache_of_a_model_that_sees_both_ways(tiny_model: Path, tmp_path: Path) -> None:
    """None unless it is asked for; the command then does what the loop does with it."""
    loaded = load_model(str(tiny_model))
    canvas = Canvas.blank(loaded.text.encode(PROMPT), 24, loaded.backend.info.mask_id, 8)
    topk = get_sampler("topk")
    row = Row(canvas, topk, topk.Params(), end_ids=loaded.backend.info.end_ids, cache=CacheMode.DUAL)
    finish([row], loaded.backend.predict)
    common = ("generate", PROMPT, "--model", tiny_model, "--max-tokens", 24, "--block-length", 8, "--sampler", "topk")
    assert right(*common, "--cache", "dual").stdout == loaded.text.decode(row.text_tokens()) + "\n"
    assert right(*common).stdout == right(*common, "--cache", "none").stdout != right(*common, "--cache", "dual").stdout
    file = tmp_path / "rows.json"
    for options in ((), ("--cache", "dual")):
        right("evaluate", "--model", tiny_model, *QUICK, "--block-length", 5, "--json", file, *options)
    assert [row["cache"] for row in read_json(file)["rows"]] == ["none", "dual"]


@pytest.mark.parametrize("command", [("generate", PROMPT), ("evaluate", *QUICK)])
def test_wrong_use_names_the_flag(tiny_model: Path, tmp_path: Path, command: tuple[object, ...]) -> None:
    assert "--cache" in refused(2, *command, "--model", tiny_model, "--cache", "always")
    folder = write_decoder(tmp_path / "v2", FAST_DLLM)
    said = refused(2, *command, "--model", folder, "--block-length", 5)
    assert "--block-length" in said and "does not divide the model's blocks of 16" in said
