"""Writers that are killed while they write: whatever replaces a file or a folder leaves the old one or the new one."""

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from policies.checkpoint import load_policy, save_policy
from policies.evaluate import Row
from policies.recipe import PolicyRecipe
from policies.run_state import RunState
from server.bench.results import Result, write_results
from server.evaluation.card import Card, place
from server.evaluation.results import Results, add_row, open_results
from server.training.export import export
from server.training.recipe import Recipe
from server.training.trainer import Trainer
from tests.policies.tiny import card, network, recipe

PREPARED = 8
"""Versions that are made before anything is killed: a forked child computes nothing."""


@dataclass(frozen=True)
class Writer:
    """Something that is written again and again in one place.

    Attributes:
        write: write that version into a folder, which holds the one before it.
        read: the version that a folder holds; raises whatever it likes if it holds none, or parts of several.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int]


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


def trainers(folder: Path) -> list[Trainer]:
    """A training run that has come to different steps."""
    made = []
    for version in range(PREPARED):
        trainer = Trainer(Recipe.model_validate(TRAINING), folder)
        filled(trainer.model, version)
        trainer.step = version
        made.append(trainer)
    (folder / "log.jsonl").touch()
    return made


def training_states(made: list[Trainer]) -> Writer:
    def write(folder: Path, version: int) -> None:
        trainer = made[version % PREPARED]
        trainer.out = folder
        trainer.save()

    def read(folder: Path) -> int:
        found = Trainer(Recipe.model_validate(TRAINING), folder)
        assert found.resume()
        return one(values(dict(found.model.named_parameters())) | {found.step})

    return Writer("the state of a model's training", write, read)


def exports(made: list[Trainer]) -> Writer:
    """Notes of different lengths are in the card; weights and card must be of one version, all files there."""

    def write(folder: Path, version: int) -> None:
        trainer, out = made[version % PREPARED], folder / "run"
        out.mkdir(exist_ok=True)
        trainer.out = out
        (out / "log.jsonl").touch()
        export(trainer, "", 1, out, note=f"version {version % PREPARED}")

    def read(folder: Path) -> int:
        out = folder / "run"
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
            json.loads((out / name).read_bytes())
        assert (out / "log.jsonl").is_file(), "what else is in the folder stays"
        said = (out / "README.md").read_text()
        noted = [version for version in range(PREPARED) if f"version {version}\n" in said]
        return one(values(load_file(out / "model.safetensors")) | set(noted))

    return Writer("an exported model", write, read)


def row(number: int) -> Row:
    numbers = {"count": 1, "correct": 1, "accuracy": 1, "accuracy_low": 0, "accuracy_high": 1}
    settings = {"task": "a", "sampler": "topk", "params": {}, "block_length": None, "gen_length": 1}
    done = {"tokens": 1, "forwards": 1, "tpf": 1, "seconds": 1, "fill_after_end": True}
    return Row.model_validate({"seed": number, **settings, **numbers, **done})


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


def all_writers(folder: Path) -> list[Writer]:
    """Every writer; a training run is made in `folder`."""
    runs = trainers(folder)
    return [
        policies(),
        run_states(),
        training_states(runs),
        exports(runs),
        results(),
        cards(),
        measurements(),
    ]


def forked(work: Callable[[], object]) -> int:
    """Run something in a copy of this process; its id. It ends with status 0, or with 1 where it raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that the copy lacks; it computes nothing
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_somewhere(writer: Writer, folder: Path, longest: float, chance: random.Random) -> str | None:
    """Let a child write version after version, kill it after up to `longest` seconds; what is wrong with what is left.

    The folder must hold some version, and must take another one afterwards.
    """

    def write_on() -> None:
        for version in range(1, 10_000):
            writer.write(folder, version)

    child = forked(write_on)
    time.sleep(chance.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        writer.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def kill_at_every_step(writer: Writer, make: Callable[[], Path], modules: tuple[str, ...]) -> tuple[int, list[str]]:
    """Write version 1 over version 0, and die before each line that is executed in these modules, in turn.

    Returns how many lines there were, and what was wrong after dying before which.
    """
    wrong, before = [], 0
    while True:
        folder = make()
        writer.write(folder, 0)
        before += 1
        child = forked(partial(dying, writer, folder, before, modules))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, DIED), f"{writer.name}: status {code}"
        try:
            found = writer.read(folder)
            if code == 0 and found != 1:
                wrong.append(f"the end: version {found}")
            writer.write(folder, 2)
            if (found := writer.read(folder)) != 2:
                wrong.append(f"line {before}: the next one is {found}")
        except Exception as error:
            wrong.append(f"line {before}: {type(error).__name__}: {error}"[:200])
        if code == 0:
            return before, wrong


DIED = 9


def dying(writer: Writer, folder: Path, before: int, modules: tuple[str, ...]) -> None:
    left = [before]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_globals.get("__name__") not in modules:
            return None if event == "call" else trace
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                os._exit(DIED)
        return trace

    sys.settrace(trace)
    try:
        writer.write(folder, 1)
    finally:
        sys.settrace(None)


def watch(writer: Writer, folder: Path, seconds: float) -> tuple[int, list[str]]:
    """Read on and on while a child writes. Returns how often, and what was wrong with what was read."""
    writer.write(folder, 0)

    def write_on() -> None:
        for version in range(1, 1_000_000):
            writer.write(folder, version)

    child = forked(write_on)
    wrong, reads, end = [], 0, time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            reads += 1
            try:
                writer.read(folder)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}"[:200])
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return reads, wrong
