import json
import os
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from server.commands.options import parse_block_length
from server.evaluation.card import Card
from server.models.loading import load_model
from server.models.text import ChatTemplateError, TextCodec
from server.training.recipe import load_recipe
from server.training.trainer import Trainer
from tests.commands.application import read_json, refused, right

RECIPE = """
# A run of no use but to see it run.
seed = 3
steps = 4
save_every = 2

[model]
d_model = 32
n_layers = 1
n_heads = 2
mlp_hidden_size = 32
max_sequence_length = 128

[optimizer]
learning_rate = 1e-3

[[micro_batch]]
name = "short"
rows = { sort = 2, reverse = 1 }
length = 33
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def steps_of(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_recipe_becomes_a_model_that_is_served(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert right("train-model", recipe, "--out", out, "--threads", 1).stdout == f"{out}\n"
    assert steps_of(out) == [1, 2, 3, 4]
    loaded = load_model(str(out), dtype="float32")
    assert loaded.backend.info.architecture == "LLaDAModelLM"
    assert loaded.backend.info.max_length == 128
    assert loaded.text.decode(loaded.text.encode("Zoë sorts: 12 7\n")) == "Zoë sorts: 12 7\n"
    assert right("generate", "Sort these numbers: 5 3", "--model", out, "--max-tokens", 4).stdout
    with safe_open(out / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
        assert "model.transformer.blocks.0.q_proj.weight" in names
    ends = read_json(out / "generation_config.json")
    config = read_json(out / "config.json")
    assert ends == {"eos_token_id": config["eos_token_id"], "pad_token_id": config["eos_token_id"]}
    assert all(
        os.stat(path).st_mode & 0o044 == 0o044 for path in out.iterdir() if path.name != "checkpoint.safetensors"
    )
    assert not list(out.glob("*.partial"))
    card = (out / "README.md").read_text()
    assert "- `sort`:" in card and "- `reverse`:" in card and "- `sudoku`:" not in card

    card = Card.read(out)
    assert RECIPE.strip() in card.before
    assert "seed 3, 4 steps in" in card.before
    assert f"{loaded.backend.info.parameters:,} parameters" in " ".join(card.before.split())
    assert "| 4-4 | 0 |" in card.before, "the training curve"

    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    right("train-model", recipe, "--out", out, "--note", "It was stopped twice.")
    assert "\n\nIt was stopped twice.\n\n" in Card.read(out).before
    assert (out / "model.safetensors").read_bytes() == before, "a finished run is only exported again"
    assert steps_of(out) == [1, 2, 3, 4]

    recipe.write_text(RECIPE.replace("seed = 3", "seed = 4"))
    assert "belongs to another recipe" in refused(1, "train-model", recipe, "--out", out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_the_next_goes_on(
    number: signal.Signals, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, train_step = tmp_path / "out", Trainer.train_step

    def interrupted(self: Trainer) -> dict[str, float]:
        if self.step == 2:
            os.kill(os.getpid(), number)
        return train_step(self)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        result = right("train-model", recipe, "--out", out)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert result.stdout == ""
    assert "stopped at step 3; run the same command to go on" in result.stderr
    assert not (out / "model.safetensors").exists()
    kept = Trainer(load_recipe(recipe), out)
    assert kept.resume()
    assert kept.step == 3
    assert "going on from step 3" in right("train-model", recipe, "--out", out).stderr
    assert steps_of(out) == [1, 2, 3, 4]
    assert (out / "model.safetensors").exists()


def test_what_is_no_recipe_is_wrong_use(recipe: Path, tmp_path: Path) -> None:
    assert "No such file" in refused(2, "train-model", tmp_path / "none.toml", "--out", tmp_path / "out")
    recipe.write_text(RECIPE.replace("steps = 4", "steps = 0"))
    assert "steps: Input should be greater than 0" in refused(2, "train-model", recipe, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_chat_is_its_last_question(recipe: Path, tmp_path: Path) -> None:
    right("train-model", recipe, "--out", tmp_path / "out")
    codec = TextCodec.load(tmp_path / "out")
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Sort these numbers: 1 2"},
        {"role": "assistant", "content": "Sorted: 1 2"},
        {"role": "user", "content": "  Sort these numbers: 4 3\n"},
    ]
    assert codec.chat_prompt(chat) == "Sort these numbers: 4 3"
    with pytest.raises(ChatTemplateError, match="there is no user message"):
        codec.chat_prompt(chat[:1])


@pytest.mark.parametrize(("text", "length"), [("full", None), ("0", None), ("16", 16)])
def test_block_lengths(text: str, length: int | None) -> None:
    assert parse_block_length(text) == length
