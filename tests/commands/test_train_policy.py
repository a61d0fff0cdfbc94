"""`unmask train-policy`, and policies on the other commands' lines."""

import json
from pathlib import Path

import pytest

from policies.checkpoint import load_policy
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
