import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import load_model
from server.commands.generate import steps
from server.commands.watch import CanvasView, shade
from tests.commands.application import refused, right, unmask
from tests.samplers.models import predictor, scripted
from tests.tiny import tiny_tokenizer, write_tiny_model

PROMPT = "Tom has 3 apples."


def expected(folder: Path, prompt: str, sampler: str, block_length: int | None, max_tokens: int) -> Row:
    loaded = load_model(str(folder))
    info = loaded.backend.info
    canvas = Canvas.blank(loaded.text.encode(prompt), max_tokens, info.mask_id, block_length)
    chosen = get_sampler(sampler)
    row = Row(canvas, chosen, chosen.Params(), end_ids=info.end_ids)
    finish([row], loaded.backend.predict)
    return row


@pytest.mark.parametrize("block", [(), ("--block-length", 4), ("--block-length", "full")])
def test_text_on_stdout_and_counts_on_stderr(tiny_model: Path, block: tuple[object, ...]) -> None:
    row = expected(tiny_model, PROMPT, "topk", 4 if 4 in block else None, 12)
    result = right("generate", PROMPT, "--model", tiny_model, "--max-tokens", 12, "--sampler", "topk", *block)
    assert result.stdout == load_model(str(tiny_model)).text.decode(row.text_tokens()) + "\n"
    assert result.stderr.startswith(f"{row.completion_tokens} tokens, {row.forwards} forwards, ")
    assert f"{row.completion_tokens / row.forwards:.2f} tokens per forward" in result.stderr


def test_the_prompt_comes_from_stdin(tiny_model: Path) -> None:
    common = ("--model", tiny_model, "--max-tokens", 8)
    named = right("generate", PROMPT, *common)
    assert right("generate", "-", *common, stdin=PROMPT + "\n").stdout == named.stdout
    assert right("generate", "-", *common, stdin="He buys 5 more.\n").stdout != named.stdout


def test_the_chat_template_applies(tiny_model: Path) -> None:
    common = ("--model", tiny_model, "--max-tokens", 8)
    as_text = right("generate", f"user: {PROMPT}\nassistant:", *common)
    assert right("generate", PROMPT, "--chat", *common).stdout == as_text.stdout
    assert right("generate", PROMPT, *common).stdout != as_text.stdout


def test_a_prompt_begins_as_the_tokenizer_says(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    plain = right("generate", PROMPT, "--model", model, "--max-tokens", 8)
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 1)]
    )
    tokenizer.save(str(model / "tokenizer.json"))
    begun = right("generate", PROMPT, "--model", model, "--max-tokens", 8)
    assert begun.stdout != plain.stdout
    tiny_tokenizer().save(str(model / "tokenizer.json"))
    assert right("generate", f"<|endoftext|>{PROMPT}", "--model", model, "--max-tokens", 8).stdout == begun.stdout


def test_a_mask_token_in_the_prompt_is_refused(tiny_model: Path) -> None:
    message = refused(2, "generate", f"{PROMPT} <|mdm_mask|>", "--model", tiny_model)
    assert "PROMPT" in message and "<|mdm_mask|>" in message
    right("generate", f"{PROMPT} <|mdm_mask|>", "--chat", "--model", tiny_model, "--max-tokens", 4)


def test_drawn_tokens_follow_the_seed(tiny_model: Path) -> None:
    def drawn(seed: int) -> str:
        options = ("--temperature", 2, "--top-p", 0.99, "--top-k", 50, "--seed", seed)
        return right("generate", PROMPT, "--model", tiny_model, "--max-tokens", 16, *options).stdout

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_sampler_parameters_count(tiny_model: Path) -> None:
    result = right(
        *("generate", PROMPT, "--model", tiny_model, "--max-tokens", 12),
        *("--sampler", "topk", "--sampler-params", '{"k": 6}', "--no-fill-after-end"),
    )
    assert " 2 forwards, " in result.stderr


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--sampler", "best", "unknown sampler 'best'"),
        ("--sampler", "oracle", "unknown sampler 'oracle'"),
        ("--sampler-params", '{"threshold": 2}', "threshold: Input should be less than or equal to 1"),
        ("--sampler-params", "[1]", "[1] is not a JSON object"),
        ("--sampler-params", "{", "not JSON"),
        ("--block-length", "-1", "'-1' is neither a number of positions nor 'full'"),
        ("--block-length", "1" + "0" * 5000, "10000000000000000000 is more than 16777216"),
        ("--max-tokens", "1" + "0" * 400, "less than or equal to 16777216"),
        ("--max-tokens", "1000", "exceed the model's 256"),
        ("--top-p", "0", "must be above 0"),
        ("--temperature", "-1", "greater than or equal to 0"),
        ("--temperature", "nan", "greater than or equal to 0"),
    ],
)
def test_wrong_use_names_the_flag(tiny_model: Path, flag: str, value: str, why: str) -> None:
    said = refused(2, "generate", PROMPT, "--model", tiny_model, flag, value)
    assert flag in said
    assert why in said


def test_modifiers_are_around_the_sampler(tiny_model: Path) -> None:
    common = ("generate", PROMPT, "--model", tiny_model, "--max-tokens", 12, "--sampler", "topk")
    plain, guided = right(*common), right(*common, "--modifier", "guidance:scale=1.5")
    assert " 12 forwards, " in plain.stderr and " 24 forwards, " in guided.stderr
    assert guided.stdout != plain.stdout
    negative = ("--modifier", "spacing", "--modifier", "guidance:scale=1.5,negative_prompt=He buys 5 more.")
    assert right(*common, *negative).stdout not in (plain.stdout, guided.stdout)


@pytest.mark.parametrize(
    ("modifiers", "why"),
    [
        (["best"], "unknown modifier 'best'; choose from guidance, credit, spacing"),
        (["guidance"], "guidance: scale: Field required"),
        (["guidance:scale=-1"], "guidance: scale: Input should be greater than or equal to 0"),
        (["guidance:scale"], "is not name:param=value"),
        (["credit", "credit"], "modifier credit is there twice"),
    ],
)
def test_wrong_modifiers_are_wrong_use(tiny_model: Path, modifiers: list[str], why: str) -> None:
    flags = [part for each in modifiers for part in ("--modifier", each)]
    said = refused(2, "generate", PROMPT, "--model", tiny_model, *flags)
    assert "'--modifier'" in said and why in said


def test_what_cannot_be_around_a_sampler(tiny_model: Path) -> None:
    said = refused(2, "generate", PROMPT, "--model", tiny_model, "--sampler", "credit", "--modifier", "credit")
    assert "'--modifier'" in said and "so does sampler credit" in said


def test_steps_that_do_not_fit_the_blocks_are_wrong_use(tiny_model: Path) -> None:
    options = ("--sampler", "topk", "--sampler-params", '{"steps": 2}', "--block-length", 4, "--max-tokens", 16)
    assert "--sampler-params" in refused(2, "generate", PROMPT, "--model", tiny_model, *options)


def test_what_is_no_model_is_one_line(tmp_path: Path) -> None:
    said = refused(1, "generate", PROMPT, "--model", tmp_path)
    assert said.startswith(f"Error: {tmp_path}")


def test_a_model_without_chat_template_says_so(tmp_path: Path) -> None:
    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "plain", chat_template=None)
    assert "no chat template" in refused(1, "generate", PROMPT, "--chat", "--model", folder)


def test_weights_that_are_not_finite_end_the_command(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.tiny import write_tiny_model

    folder = write_tiny_model(tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.ln_f.weight"] = torch.full_like(weights["model.transformer.ln_f.weight"], torch.nan)
    save_file(weights, folder / "model.safetensors")
    assert "not finite" in refused(1, "generate", PROMPT, "--model", folder)


def test_watching_without_a_terminal_prints_the_text_only(tiny_model: Path) -> None:
    common = ("generate", PROMPT, "--model", tiny_model, "--max-tokens", 8)
    watched, plain = unmask(*common, "--watch"), unmask(*common)
    assert watched.stdout == plain.stdout
    assert "\x1b" not in watched.output


def test_the_view_shows_masks_confidence_and_the_newest(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model))
    canvas = Canvas.blank(loaded.text.encode(PROMPT), 6, loaded.backend.info.mask_id)
    topk = get_sampler("topk")
    row = Row(canvas, topk, topk.Params.model_validate({"k": 2}), end_ids=loaded.backend.info.end_ids)
    view = CanvasView(row, loaded.text.token)
    assert view.text().plain == " ░░" * 6
    seen = []
    for outcome, _ in steps(row, loaded.backend.predict):
        view.show(outcome)
        text = view.text()
        assert text.plain.count(" ░░") == int(row.canvas.masked.sum())
        newest = [span for span in text.spans if "reverse" in str(span.style)]
        assert len(newest) == len(outcome.positions) == 2
        shades = [str(span.style).split()[0] for span in newest]
        order = sorted(range(2), key=outcome.positions.__getitem__)
        assert shades == [shade(outcome.confidences[i]) for i in order]
        seen += outcome.positions
    assert sorted(seen) == list(range(6))


def test_the_view_ends_the_text_at_its_end() -> None:
    topk = get_sampler("topk")
    row = Row(Canvas.blank([], 6, 0), topk, topk.Params(k=3), end_ids=frozenset({1}))
    view = CanvasView(row, {1: "never shown", 7: " seven", 8: "\x1b[2J"}.__getitem__)
    event, _ = next(steps(row, predictor(scripted({0: (7, 0.5), 1: (8, 0.9), 3: (1, 0.7)}))))
    view.show(event)
    assert view.text().plain == " seven\N{REPLACEMENT CHARACTER}[2J ░░ ∎"


def test_watching_in_a_terminal_draws_there_and_keeps_stdout_clean(tiny_model: Path) -> None:
    leader, follower = pty.openpty()
    code = "from tests.commands.application import app; app()"
    arguments = ["generate", PROMPT, "--model", str(tiny_model), "--max-tokens", "8", "--watch", "--pause", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--sampler", "topk"],
        stdout=subprocess.PIPE,
        stderr=follower,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(follower)
    screen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # how the end of a pseudo-terminal reads
            break
        if not part:
            break
        screen += part
    assert process.stdout is not None
    with process.stdout:
        text = process.stdout.read().decode()
    assert process.wait() == 0
    os.close(leader)
    assert text == right("generate", PROMPT, "--model", tiny_model, "--max-tokens", 8, "--sampler", "topk").stdout
    pictures = [int(n) for n in re.findall(r"forward (\d+) ", screen.decode())]
    assert sorted(set(pictures)) == list(range(9))
    assert "░░" in screen.decode()
    assert "8 tokens, 8 forwards, 1.00 tokens per forward" in screen.decode()
