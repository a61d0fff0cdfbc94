"""`unmask train-model`: train a small masked-diffusion model from a recipe."""

from pathlib import Path
from typing import Annotated

import typer

from server.commands.options import TrainingThreads, check_folder, fail, progress_console, use_threads, wrong
from server.commands.signals import stopping_on_signals


def register(app: typer.Typer) -> None:
    app.command("train-model")(train_model)


def train_model(
    recipe: Annotated[Path, typer.Argument(help="The run, as a TOML file.", metavar="RECIPE.toml")],
    out: Annotated[Path, typer.Option("--out", help="Where checkpoint, log and the finished model go.")],
    threads: TrainingThreads = 1,
    note: Annotated[
        str, typer.Option("--note", help="A remark for the model card that the recipe does not make.")
    ] = "",
) -> None:
    """Train a model and write it as a Hugging Face folder. Run it again to go on from the last checkpoint."""
    from safetensors import SafetensorError

    from policies.files.regular import read_text
    from policies.files.toml import MOST_BYTES
    from server.training.export import export
    from server.training.recipe import load_recipe
    from server.training.trainer import Trainer

    try:
        parsed = load_recipe(recipe)
        text = read_text(recipe, MOST_BYTES)  # read now: the file may have changed by the end of the run
    except ValueError as error:
        wrong("RECIPE.toml", error)
    check_folder("--out", out)
    use_threads(threads)
    console = progress_console()
    try:
        trainer = Trainer(parsed, out)
        if trainer.resume():
            console.print(f"going on from step {trainer.step}")
        with stopping_on_signals(trainer):
            trainer.run(console)
        if trainer.progress < 1:
            console.print(f"stopped at step {trainer.step}; run the same command to go on")
            return
        export(trainer, text, threads, out, note)
    except (OSError, ValueError, FloatingPointError, SafetensorError) as error:
        fail(error)
    typer.echo(str(out))
