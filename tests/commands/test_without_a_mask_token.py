"""Commands with a model that has no mask token."""

import json
from pathlib import Path

import pytest

from samplers import AttentionPattern, Canvas, get_sampler
from samplers.loop.row import Row
from server.commands.generate import steps
from server.commands.watch import CanvasView
from tests.commands.application import refused, right
from tests.samplers.models import VOCAB, predictor, random_logits
from tests.tiny_gemma import write_tiny_gemma

PROMPT = "Tom has 3 apples."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("models") / "gemma")


def test_generate_takes_the_models_own_sampler(folder: Path) -> None:
    common = ("generate", PROMPT, "--model", folder, "--max-tokens", 12)
    params = ("--sampler-params", '{"max_denoising_steps": 3}')
    found = right(*common, *params)
    assert " 6 forwards, " in found.stderr
    assert right(*common, *params, "--sampler", "diffusion_gemma").stdout == found.stdout
    assert right(*common, *params, "--seed", 5).stdout != found.stdout


@pytest.mark.parametrize(
    ("options", "flag", "why"),
    [
        (("--sampler", "topk"), "--sampler", "no mask token"),
        (("--temperature", 0.5), "--sampler", "use temperature 0"),
        (("--sampler-params", '{"k": 1}'), "--sampler-params", "diffusion_gemma: k"),
    ],
)
def test_generate_says_what_does_not_go(folder: Path, options: tuple[object, ...], flag: str, why: str) -> None:
    said = refused(2, "generate", PROMPT, "--model", folder, *options)
    assert f"'{flag}'" in said and why in said


def test_serve_says_that_a_sampler_does_not_fit(folder: Path) -> None:
    said = refused(2, "serve", "--model", folder, "--sampler", "topk", "--port", 0)
    assert "'--sampler'" in said and "no mask token" in said


def test_evaluate(folder: Path, tmp_path: Path) -> None:
    common = ("evaluate", "--model", folder, "--task", "sort", "--count", 2, "--gen-length", 12)
    said = refused(2, *common, "--sampler", "topk:k=1")
    assert "'--sampler'" in said and "no mask token" in said
    right(*common, "--sampler", "diffusion_gemma:max_denoising_steps=3", "--json", tmp_path / "out.json")
    (measured,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert measured["forwards"] == 2 * 2 * 3, "two problems of two canvases"


def test_a_draft_is_shown_until_it_is_committed() -> None:
    rule = get_sampler("diffusion_gemma")
    canvas = Canvas.blank([3, 5], 8, None, pattern=AttentionPattern(noise=VOCAB, drafted=6))
    each = Row(canvas, rule, rule.Params(max_denoising_steps=2, confidence_threshold=0.0))
    view = CanvasView(each, lambda token: f"<{token}>")
    assert view.text().plain.count("<") == 0
    events = (event for event, _ in steps(each, predictor(random_logits, None)))
    event = next(events)
    view.show(event)
    assert view.text().plain.startswith("".join(f"<{token}>" for token in event.draft))
    assert view.text().plain.count("<") == 6
    view.show(next(events))
    assert view.text().plain.count("<") == 6, "the second block has no draft yet"
