"""All that writes files which others read, each with versions to write and a way to tell which is there."""

import json
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import nn

from policies.evaluation.card import Card, place
from policies.evaluation.measure import Measurement
from policies.evaluation.plot import draw
from policies.evaluation.results import Results, add_row, open_results
from policies.network.observation import Observation
from policies.serving.checkpoint import load_policy, save_policy
from policies.training.checkpointing import RunState
from policies.training.recipe import PolicyRecipe
from policies.training.runs import Runs
from policies.training.transitions import Transitions
from server.bench.results import Result, write_results
from server.training.export import export
from server.training.recipe import Recipe
from server.training.trainer import Trainer
from tests.kills import Writer
from tests.policies.tiny import card, network, recipe

PREPARED = 8
"""Versions that are made before anything is killed: a forked child computes nothing."""


def one(values: set[float]) -> int:
    """The only number of a set."""
    (found,) = values
    return int(found)


def filled(module: nn.Module, value: float) -> Any:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def values(tensors: dict[str, torch.Tensor]) -> set[float]:
    return {value for tensor in tensors.values() for value in tensor.float().flatten().tolist()}


def policies() -> Writer:
    """Two shapes in turn, so that one's card does not fit the other's weights."""
    made = []
    for version in range(PREPARED):
        config = {"hidden": 16 if version % 2 else 32}
        trained = {"updates": version}
        made.append((filled(network(0, **config), version), card(config=config, trained_on=trained)))

    def read(folder: Path) -> int:
        found, its_card = load_policy(folder / "p")
        return one(values(found.state_dict()) | {its_card.trained_on.updates})

    return Writer("a policy", lambda folder, version: save_policy(*made[version % PREPARED], folder / "p"), read)


def run_states() -> Writer:
    stages = ({"kind": "collect", "runs": 1}, {"kind": "fit", "steps": 1})
    recipes: PolicyRecipe = recipe(*stages)
    made = [
        RunState(filled(network(0, region=False), v), None, None, {"update": v, "stage": 0}) for v in range(PREPARED)
    ]

    def read(folder: Path) -> int:
        into = network(0, region=False)
        state = RunState.load(folder / "state.safetensors", recipes, into, lambda stage: torch.optim.AdamW([]))
        return one(values(into.state_dict()) | {state.numbers["update"]})

    return Writer(
        "the state of a policy's training",
        lambda folder, version: made[version % PREPARED].save(folder / "state.safetensors", recipes),
        read,
    )


TRAINING = {
    "steps": 6,
    "model": {"d_model": 32, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 48, "max_sequence_length": 64},
    "optimizer": {"name": "adamw", "learning_rate": 0.01},
    "micro_batch": [{"name": "drill", "kind": "equations", "rows": {"any": 2}, "length": 24}],
}


def training_run(folder: Path) -> Trainer:
    trainer = Trainer(Recipe.model_validate(TRAINING), folder)
    (folder / "log.jsonl").touch()
    return trainer


def come_to(trainer: Trainer, version: int, out: Path) -> Trainer:
    """The run at that step, in another folder."""
    filled(trainer.model, version % PREPARED)
    trainer.step, trainer.out = version % PREPARED, out
    return trainer


def training_states(trainer: Trainer) -> Writer:
    def read(folder: Path) -> int:
        come_to(trainer, 0, folder)
        assert trainer.resume()
        return one(values(dict(trainer.model.named_parameters())) | {trainer.step})

    return Writer(
        "the state of a model's training", lambda folder, version: come_to(trainer, version, folder).save(), read
    )


def exports(trainer: Trainer) -> Writer:
    """Notes of different lengths are in the card; weights and card must be of one version, all files there."""

    def write(folder: Path, version: int) -> None:
        out = folder / "run"
        out.mkdir(exist_ok=True)
        (out / "log.jsonl").touch()
        export(come_to(trainer, version, out), "", 1, out, note=f"version {version % PREPARED}")

    def read(folder: Path) -> int:
        out = folder / "run"
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            json.loads((out / name).read_bytes())
        assert (out / "log.jsonl").is_file(), "what else is in the folder stays"
        said = (out / "README.md").read_text()
        noted = [version for version in range(PREPARED) if f"version {version}\n" in said]
        return one(values(load_file(out / "model.safetensors")) | set(noted))

    return Writer("an exported model", write, read)


def row(number: int) -> Measurement:
    numbers = {"count": 1, "correct": 1, "accuracy": 1, "accuracy_low": 0, "accuracy_high": 1}
    settings = {"task": "a", "sampler": "topk", "params": {}, "block_length": None, "gen_length": 1}
    done = {"tokens": 1, "forwards": 1, "tpf": 1, "seconds": 1, "fill_after_end": True}
    return Measurement.model_validate({"seed": number, **settings, **numbers, **done})


def results() -> Writer:
    fresh = Results(model="m", digest="d", dtype="float32")

    def write(folder: Path, version: int) -> None:
        if version == 0:
            (folder / "rows.json").unlink(missing_ok=True)
        add_row(folder / "rows.json", fresh.model_copy(deep=True), row(version))

    def read(folder: Path) -> int:
        found = open_results(folder / "rows.json", fresh).rows
        assert [each.seed for each in found] == list(range(len(found)))
        return found[-1].seed

    return Writer("rows of evaluate", write, read)


def cards() -> Writer:
    def write(folder: Path, version: int) -> None:
        path = folder / "README.md"
        if not path.exists():
            path.write_text(place("none"))
        Card.read(folder).write(f"version {version % PREPARED} " * 2000)

    def read(folder: Path) -> int:
        said = (folder / "README.md").read_text()
        return one({version for version in range(PREPARED) if place(f"version {version} " * 2000) in said})

    return Writer("a model card", write, read)


def measurements() -> Writer:
    def write(folder: Path, version: int) -> None:
        found = [Result("a", version % PREPARED, 0, 1, "x") for _ in range(500)]
        write_results(folder / "bench.json", {"version": version % PREPARED}, found)

    def read(folder: Path) -> int:
        found = json.loads((folder / "bench.json").read_bytes())
        return one({found["machine"]["version"]} | {each["ratio"] for each in found["results"]})

    return Writer("results of bench", write, read)


def collected() -> Writer:
    """Runs of one position each."""

    def made(version: int) -> Runs:
        def number() -> torch.Tensor:
            return torch.full((3,), float(version))

        def tensors_of(kind: type[Any]) -> dict[str, torch.Tensor]:
            return {each.name: number() for each in fields(kind) if each.name != "seen"}

        return Runs(
            Transitions(seen=Observation(**tensors_of(Observation)), **tensors_of(Transitions)), number(), number()
        )

    runs = [made(version) for version in range(PREPARED)]

    def read(folder: Path) -> int:
        return one(values(load_file(folder / "runs-0.safetensors")))

    return Writer(
        "runs that were collected",
        lambda folder, version: runs[version % PREPARED].save(folder / "runs-0.safetensors"),
        read,
    )


def plots() -> Writer:
    """Pictures of one colour, as it were: what draws them is not what is killed."""

    def write(folder: Path, version: int) -> None:
        def saved(figure: Figure, to: BytesIO, **options: Any) -> None:
            to.write(bytes([version % PREPARED]) * 100_000)

        with patch.object(Figure, "savefig", saved):
            draw([row(0)], "", folder / "plot.png")

    return Writer("a plot", write, lambda folder: one(set(map(float, (folder / "plot.png").read_bytes()))))


def all_writers(folder: Path) -> list[Writer]:
    """Every writer; a training run is made in `folder`."""
    run = training_run(folder)
    return [
        policies(),
        run_states(),
        training_states(run),
        exports(run),
        results(),
        cards(),
        measurements(),
        collected(),
        plots(),
    ]
