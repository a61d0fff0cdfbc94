"""`unmask train-policy`, and policies on the other commands' lines."""

import json
from pathlib import Path

import pytest

from policies.serving.checkpoint import load_policy
from tests.commands.application import read_json, refused, right

RECIPE = """
seed = 1
tasks = ["reverse"]
gen_length = 8
batch = 8
check = 4
save_every = 1

[policy]
features = ["top", "doubt", "top_logs", "entropy"]
top = 3
region = false
hidden = 16
heads = 2
feedforward = 16
takes_speed = true

[[stage]]
kind = "collect"
runs = 8

[[stage]]
kind = "fit"
steps = 5
batch = 4

[[stage]]
kind = "grpo"
updates = 2
prompts = 2
group = 2
alphas = [0.3, 3.0]
"""


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policies")
    (folder / "recipe.toml").write_text(RECIPE)
    right("train-policy", folder / "recipe.toml", "--model", tiny_model, "--out", folder / "run")
    return folder / "run"


def test_a_run_leaves_a_policy_its_state_and_its_logs(trained: Path, tiny_model: Path) -> None:
    _, card = load_policy(trained)
    assert card.trained_on.model == "tiny" and card.trained_on.architecture == "LLaDAModelLM"
    assert card.trained_on.alphas == (0.3, 3.0) and card.trained_on.gen_lengths == (8,)
    assert card.recipe["seed"] == 1
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["collect", "fit", "check", "grpo", "grpo", "check"]
    assert list((trained / "tensorboard").glob("events.*"))
    again = right("train-policy", trained.parent / "recipe.toml", "--model", tiny_model, "--out", trained)
    assert "going on from stage 3" in again.stderr


def test_the_policy_is_evaluated_and_generates(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    named = ("--model", tiny_model, "--policy", f"mine={trained}")
    file = tmp_path / "rows.json"
    spec = "policy:policy=mine,speed=0.9"
    options = ("--task", "reverse", "--sampler", spec, "--count", 3, "--gen-length", 8, "--json", file)
    right("evaluate", *named, *options)
    (row,) = read_json(file)["rows"]
    assert row["sampler"] == "policy" and row["params"] == {"policy": "mine", "beta": 1.0, "speed": 0.9}
    params = '{"policy": "mine"}'
    right("generate", "Tom has", *named, "--sampler", "policy", "--sampler-params", params, "--max-tokens", 8)


def heldout_file(folder: Path, count: int) -> str:
    """The spec of a task with so many held-out problems, and as many to train on."""
    for split in ("train", "heldout"):
        lines = [json.dumps({"prompt": f"Say {n} {split}", "answer": str(n)}) for n in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return f"file:train={folder / 'train.jsonl'},heldout={folder / 'heldout.jsonl'}"


def edited(changes: dict[str, str]) -> str:
    text = RECIPE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({'"reverse"': '"TASK"', "check = 4": "check = 9"}, "has 8 heldout problems, not 9"),
        ({'"reverse"': '"reverse", "TASK"', "check = 4": "check = 9"}, "has 8 heldout problems, not 9"),
        ({'"reverse"': '"file:heldout=FOLDER/heldout.jsonl"'}, "has 0 train problems"),
        ({'"reverse"': '"file:path=FOLDER/none.jsonl"'}, "No such file"),
        ({'"reverse"': '"riddles"'}, "unknown task 'riddles'"),
    ],
)
def test_too_few_problems_are_found_before_a_model_is_loaded(
    tmp_path: Path, changes: dict[str, str], said: str
) -> None:
    task = heldout_file(tmp_path, 8)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(edited(changes).replace("TASK", task).replace("FOLDER", str(tmp_path)))
    no_model = ("--model", tmp_path / "no-model")
    assert said in refused(2, "train-policy", recipe, *no_model, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_that_do_not_fit_the_model_are_found_before_any_stage(tiny_model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "long " * (3 if n < 60 else 400), "answer": str(n)} for n in range(61)]
    lines = [line | {"prompt": f"{n} {line['prompt']}"} for n, line in enumerate(lines)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(edited({'"reverse"': f'"file:train={tmp_path / "own.jsonl"}"', "check = 4": "check = 0"}))
    said = refused(1, "train-policy", recipe, "--model", tiny_model, "--out", tmp_path / "out")
    assert "a prompt of task own-" in said and "more than the model's 256" in said
    recipe.write_text(edited({"gen_length = 8": "gen_length = 300"}))
    assert "gen_length of 300" in refused(1, "train-policy", recipe, "--model", tiny_model, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_written_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for out, said in ((tmp_path / "recipe.toml", "is not a folder"), (Path("/proc/unmask"), "cannot be written to")):
        assert said in refused(2, "train-policy", tmp_path / "recipe.toml", "--model", "none", "--out", out)


def test_a_run_goes_on_with_its_own_model_and_runs(trained: Path, ending_model: Path, tiny_model: Path) -> None:
    recipe = trained.parent / "recipe.toml"
    assert "belongs to another model" in refused(1, "train-policy", recipe, "--model", ending_model, "--out", trained)


def test_wrong_use_names_the_flag(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = ("--model", tiny_model)
    assert "NAME=DIR" in refused(2, "generate", "a", *model, "--policy", "mine")
    assert "no policy 'x' is loaded" in refused(
        2, "evaluate", *model, "--task", "reverse", "--sampler", "policy:policy=x", "--gen-length", 8
    )
    assert "No such file" in refused(1, "generate", "a", *model, "--policy", f"mine={tmp_path}")
    (tmp_path / "bad.toml").write_text("tasks = 3")
    assert "tasks" in refused(2, "train-policy", tmp_path / "bad.toml", *model, "--out", tmp_path / "o")
    (tmp_path / "other.toml").write_text(RECIPE.replace("seed = 1", "seed = 2"))
    assert "another recipe" in refused(1, "train-policy", tmp_path / "other.toml", *model, "--out", trained)
