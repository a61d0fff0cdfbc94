"""`unmask train-policy`: train an unmasking policy from a recipe, against any model that can be served."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.commands.options import (
    Chat,
    Device,
    Dtype,
    Model,
    TrainingThreads,
    check_folder,
    fail_with_cause,
    model_under_test,
    open_model,
    progress_console,
    use_threads,
    wrong,
)
from server.commands.signals import stopping_on_signals

if TYPE_CHECKING:
    from policies.serving.checkpoint import Origin
    from policies.training.trainer import PolicyTrainer, Report
    from server.backends.loading import LoadedModel


def register(app: typer.Typer) -> None:
    app.command("train-policy")(train_policy)


def train_policy(
    recipe: Annotated[Path, typer.Argument(help="The run, as a TOML file.", metavar="RECIPE.toml")],
    out: Annotated[Path, typer.Option("--out", help="Where state, logs and the policy go; a server can watch it.")],
    model: Model = None,
    chat: Chat = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: TrainingThreads = 1,
) -> None:
    """Train a policy. Run it again to go on from the last checkpoint; `torchrun` runs it in several processes."""
    from safetensors import SafetensorError

    from policies.tasks import get_task
    from policies.training.data_parallel import DataParallel
    from policies.training.preflight import check_problems
    from policies.training.recipe import load_policy_recipe
    from policies.training.trainer import PolicyTrainer
    from samplers import SamplerError

    try:
        parsed, content = load_policy_recipe(recipe)
    except ValueError as error:
        wrong("RECIPE.toml", error)
    try:
        for name in parsed.tasks:
            get_task(name)
    except (KeyError, ValueError) as error:
        wrong("RECIPE.toml", f"{recipe}: tasks: {error.args[0]}")
    try:
        check_problems(parsed)
    except ValueError as error:
        wrong("RECIPE.toml", f"{recipe}: {error}")
    check_folder("--out", out)
    use_threads(threads)
    loaded = open_model(model, device, dtype)
    world = DataParallel.join()
    try:
        trainer = PolicyTrainer(parsed, content, model_under_test(loaded, chat), _origin(model, loaded), out, world)
        with _reporting(trainer) as report, stopping_on_signals(trainer):
            if trainer.resume():
                progress_console().print(f"going on from stage {trainer.stage}, update {trainer.update}")
            trainer.report = report
            trainer.run()
    except (OSError, ValueError, FloatingPointError, SafetensorError, SamplerError) as error:
        fail_with_cause(error)
    finally:
        world.leave()
    if trainer.stage < len(parsed.stage):
        progress_console().print("stopped; run the same command to go on")
        return
    if world.first:
        typer.echo(str(out))


def _origin(model: str | None, loaded: "LoadedModel") -> "Origin":
    """Description of the model for the policy's card."""
    from policies.evaluation.results import model_digest
    from policies.serving.checkpoint import Origin
    from server.backends.loading import find_model

    info = loaded.backend.info
    return Origin(
        model=loaded.name,
        model_digest=model_digest(find_model(model)[1]),
        architecture=info.architecture,
        vocab_size=info.vocab_size,
    )


@contextmanager
def _reporting(trainer: "PolicyTrainer") -> "Iterator[Report]":
    """Report to a progress bar on standard error, to `metrics.jsonl` (one JSON line a report) and to TensorBoard."""
    if not trainer.world.first:
        yield lambda line: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from tensorboardX import SummaryWriter

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        Progress(*columns, console=progress_console()) as bar,
        (trainer.out / "metrics.jsonl").open("a", buffering=1) as log,
        SummaryWriter(str(trainer.out / "tensorboard"), write_to_disk=True) as board,
    ):
        tasks: dict[int, Any] = {}

        def report(line: dict[str, Any]) -> None:
            stage = line["stage"]
            done = next((line[key] for key in ("update", "step", "runs") if key in line), 1)
            if line["kind"] != "check":
                if stage not in tasks:
                    tasks[stage] = bar.add_task(line["kind"], total=line.get("of", 1))
                shown = [f"{key} {line[key]:.3g}" for key in ("reward", "right", "tpf", "loss") if key in line]
                bar.update(tasks[stage], completed=done, description=" ".join([line["kind"], *shown]))
            log.write(json.dumps(line) + "\n")
            for key, value in line.items():
                if isinstance(value, int | float) and key not in ("stage", "of"):
                    board.add_scalar(f"{stage}-{line['kind']}/{key}", value, done)

        yield report
