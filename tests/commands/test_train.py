import json
import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from safetensors import safe_open

from policies.evaluation.card import Card
from policies.tasks import embedded_tasks, get_task
from server.backends.loading import load_model
from server.commands.options import parse_block_length
from server.models.text.codec import ChatTemplateError, TextCodec
from server.training.recipe import load_recipe
from server.training.trainer import Trainer
from tests.commands.application import read_json, refused, right, unmask

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
    assert not list(out.rglob(".*"))
    card = (out / "README.md").read_text()
    assert "- `sort`:" in card and "- `reverse`:" in card and "- `sudoku`:" not in card
    assert "license: apache-2.0" in card and "from files" not in card
    assert "unmask evaluate --model MODEL --task sort --task reverse --block-length full" in card
    assert "> Sort these numbers: " in card

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


OWN = [{"prompt": f"Say {n}\nplease", "answer": str(n), "reference": f"It is {n}"} for n in range(10, 60)]


def own_data(file: Path, problems: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return file


@pytest.mark.parametrize(("option", "held_out"), [("path", True), ("train", False)])
def test_a_card_claims_what_the_model_was_trained_on_and_nothing_else(
    tmp_path: Path, option: str, held_out: bool
) -> None:
    spec = f"file:{option}={own_data(tmp_path / 'riddles.jsonl', OWN)},checker=number"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("rows = { sort = 2, reverse = 1 }", f'rows = {{ "{spec}" = 2 }}'))
    out = tmp_path / "out"
    right("train-model", recipe, "--out", out)
    card = (out / "README.md").read_text()
    task = get_task(spec)
    heldout = task.count("heldout")
    assert (heldout != 0) is held_out
    assert f"\n- `{task.name}`: prompts and answers of a user's own\n" in card
    assert f"`{task.name}` has {task.count('train')} problems from files to train on; {heldout} are held out." in card
    for other in embedded_tasks():
        assert f"`{other.name}`" not in card and other.description not in card
    for claim in ("license", "language: ", "CRC", "enerated"):
        assert claim not in card
    assert "\n> please\n" in card and "\n```\nIt is " in card
    after = Card.read(out).after
    if not held_out:
        assert "There are no held-out problems to measure it on." in after and "unmask evaluate" not in after
        return
    (command,) = re.findall(r"^unmask (evaluate (?:.|\n)*?)```", after, re.M)
    arguments = shlex.split(command.replace("MODEL", str(out)).replace("\\\n", ""))
    assert arguments[arguments.index("--count") + 1] == str(heldout)
    arguments[arguments.index("--json") + 1] = str(tmp_path / "rows.json")
    right(*arguments, "--sampler", "topk")
    assert task.name in Card.read(out).path.read_text().partition("## Measured")[2]


def test_a_card_of_drills_and_links(recipe: Path, tmp_path: Path) -> None:
    drill = '[[micro_batch]]\nname = "drill"\nkind = "equations"\nrows = { sort = 4 }\nlength = 24\n'
    recipe.write_text(RECIPE.partition("[[micro_batch]]")[0] + drill)
    right("train-model", recipe, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- sums with one operation" in card and "`sort`:" not in card and "A problem goes" not in card
    recipe.write_text(RECIPE.partition("[[micro_batch]]")[0] + drill.replace("equations", "links").replace("24", "128"))
    right("train-model", recipe, "--out", tmp_path / "links")
    card = (tmp_path / "links" / "README.md").read_text()
    assert "- `chain`:" in card and "`sort`:" not in card and "sums with one" not in card


@pytest.mark.parametrize(
    ("kind", "rows", "length", "said"),
    [
        ("masked", '"file:train=LONG,checker=number" = 1', 64, "late: of 10000 problems of task long-"),
        ("masked", '"file:heldout=LONG,checker=number" = 1', 64, "has 0 train problems"),
        ("masked", '"file:path=nowhere.jsonl" = 1', 64, "No such file"),
        ("masked", "sort = 1", 4096, "late: length 4096 is above max_sequence_length"),
        ("frontier", "sort = 1", 5, "of 10000 problems of task sort"),
        ("masked", "sort = 0", 64, "Input should be greater than 0"),
        ("links", "any = 1", 5, "of 10000 problems of task chain"),
        ("equations", "any = 1", 5, "does not fit into a length of 5"),
        ("equations", "sort = 1, chain = 1", 24, "rows of kind equations have one entry, not 2"),
    ],
)
def test_what_cannot_be_trained_is_found_before_the_first_step(
    recipe: Path, tmp_path: Path, kind: str, rows: str, length: int, said: str
) -> None:
    """Also in a micro-batch that takes part late, and instead of drawing for ever."""
    long = own_data(tmp_path / "long.jsonl", [{**OWN[0], "prompt": "long " * 200}])
    rows = rows.replace("LONG", str(long))
    late = f'[[micro_batch]]\nname = "late"\nkind = "{kind}"\nrows = {{ {rows} }}\nlength = {length}\n'
    recipe.write_text(RECIPE + late + "every = [[0.0, 0], [0.9, 1]]\n")
    result = unmask("train-model", recipe, "--out", tmp_path / "out")
    assert result.exit_code in (1, 2) and said in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_is_found_first(recipe: Path) -> None:
    assert "recipe.toml is not a folder" in refused(2, "train-model", recipe, "--out", recipe / "within")
    assert "/proc cannot be written to" in refused(2, "train-model", recipe, "--out", "/proc/unmask")


def test_the_card_has_the_recipe_that_was_trained(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step = Trainer.train_step

    def edited(self: Trainer) -> dict[str, float]:
        recipe.write_text("seed = 99")
        return train_step(self)

    monkeypatch.setattr(Trainer, "train_step", edited)
    right("train-model", recipe, "--out", tmp_path / "out")
    assert RECIPE.strip() in Card.read(tmp_path / "out").before


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
    assert codec.decode(codec.encode_chat(chat)) == "Sort these numbers: 4 3"
    with pytest.raises(ChatTemplateError, match="there is no user message"):
        codec.encode_chat(chat[:1])


@pytest.mark.parametrize(("text", "length"), [("full", None), ("0", None), ("16", 16)])
def test_block_lengths(text: str, length: int | None) -> None:
    assert parse_block_length(text) == length
