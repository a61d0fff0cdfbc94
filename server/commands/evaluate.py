"""`unmask evaluate`: accuracy against tokens per forward, as table, JSON, Markdown and plot."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policies.tasks import UnknownTaskError, get_task, list_tasks
from server.commands.options import (
    MOST_COUNT,
    MOST_LENGTH,
    Cache,
    Chat,
    Device,
    Dtype,
    FillAfterEnd,
    Model,
    Policies,
    Threads,
    check_file,
    check_folder,
    fail,
    fail_with_cause,
    model_under_test,
    open_model,
    open_policies,
    parse_block_length,
    progress_console,
    results_console,
    split_policies,
    use_threads,
    wrong,
)

if TYPE_CHECKING:
    from policies.evaluation.measure import Trial
    from policies.evaluation.results import Results
    from policies.model_under_test import ModelUnderTest
    from policies.serving.store import PolicyStore
    from server.backends.contract import ModelInfo
    from server.backends.loading import LoadedModel


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    model: Model = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Repeatable, see `unmask tasks list`; without it all.")
    ] = None,
    sampler: Annotated[
        list[str] | None,
        typer.Option(
            "--sampler",
            help="Repeatable; name:param=value,param=value, and +modifier:param=value for what is around it. A topk k "
            "of the generation's length commits everything at once; oracle commits what is right. Without it the "
            "published table's.",
            metavar="SPEC",
        ),
    ] = None,
    block_length: Annotated[
        list[str] | None,
        typer.Option(
            "--block-length",
            help="Repeatable; full or 0 (full diffusion) is the default, but for block-causal models, whose own it is.",
            metavar="N",
        ),
    ] = None,
    gen_length: Annotated[
        int | None,
        typer.Option("--gen-length", min=1, max=MOST_LENGTH, help="Generated positions; without it the task's own."),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, max=MOST_COUNT, help="Held-out problems of each task.")] = 100,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31, help="Which problems, and random numbers.")] = 0,
    policy: Policies = None,
    cache: Cache = None,
    fill_after_end: FillAfterEnd = True,
    chat: Chat = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Keep each row here once it is measured; rows already there are not redone."),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the frontier as a PNG.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="Put the Markdown into the model card of this model folder.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, max=MOST_COUNT, help="Canvases in one forward.")] = 32,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure samplers on held-out problems. Plot, Markdown and card show every row that the --json file holds."""
    for flag, path in (("--json", json_file), ("--plot", plot), ("--markdown", markdown_file)):
        check_file(flag, path)
    if json_file is not None:
        check_folder("--json", json_file.absolute().parent)  # the file is replaced after each row
    trials = _trials(task, sampler, block_length, gen_length, count, seed, fill_after_end, chat)
    from policies.evaluation.card import Card
    from policies.evaluation.report import markdown, table
    from policies.files.atomic import write_file

    try:
        place = Card.read(card) if card is not None else None
    except ValueError as error:
        wrong("--card", error)
    if card is not None:
        check_folder("--card", card)
    named = split_policies(policy)
    use_threads(threads)
    loaded = open_model(model, device, dtype)
    trials = [_for_model(trial, loaded.backend.info, cache) for trial in trials]
    policies = open_policies(named, model, loaded)
    results = _open_results(json_file, model, loaded)
    _measure(trials, model_under_test(loaded, chat), policies, results, json_file, batch)
    asked = [row for trial in trials if (row := results.find(trial)) is not None]
    results_console().print(table(asked))
    if plot is not None:
        from policies.evaluation.plot import draw

        draw(results.rows, results.model, plot)
    if markdown_file is not None:
        write_file(markdown_file, markdown(results.rows))
    if place is not None:
        place.write(markdown(results.rows))


def _trials(
    tasks: list[str] | None,
    samplers: list[str] | None,
    block_lengths: list[str] | None,
    gen_length: int | None,
    count: int,
    seed: int,
    fill_after_end: bool,
    chat: bool,
) -> "list[Trial]":
    """All combinations without repetition, in the order given. Usage errors end the command before any work."""
    blocks = [parse_block_length(text) for text in block_lengths or ["full"]]
    try:
        chosen = [get_task(name) for name in tasks] if tasks else list_tasks()
    except (UnknownTaskError, ValueError) as error:
        wrong("--task", error)
    from policies.evaluation.measure import FRONTIER, Trial
    from policies.evaluation.sampler_spec import SamplerSpec
    from samplers import UnknownModifierError, UnknownSamplerError

    trials: list[Trial] = []
    try:
        specs = [SamplerSpec.parse(text) for text in samplers or FRONTIER]
        for block in blocks:
            for task in chosen:
                for spec in specs:
                    length = gen_length or task.gen_length
                    trial = Trial(task, spec, block, length, count, seed, fill_after_end, chat)
                    trials += [] if trial in trials else [trial]
    except (UnknownSamplerError, UnknownModifierError, ValueError) as error:
        wrong("--sampler", error)
    return trials


def _for_model(trial: "Trial", info: "ModelInfo", cache: str | None) -> "Trial":
    """Trial with the model's defaults filled in. Usage errors end the command."""
    from samplers import CacheMode

    block_length = trial.block_length
    if info.pattern.causal_block is not None:
        block_length = block_length or info.block_length
    try:
        info.pattern.with_blocks(block_length)
    except ValueError as error:
        wrong("--block-length", error)
    return replace(trial, block_length=block_length, cache=CacheMode(cache or info.cache))


def _open_results(path: Path | None, model: str | None, loaded: "LoadedModel") -> "Results":
    from policies.evaluation.results import Results, ResultsError, model_digest, open_results
    from server.backends.loading import find_model

    digest = model_digest(find_model(model)[1])
    try:
        return open_results(path, Results(model=loaded.name, digest=digest, dtype=loaded.backend.info.dtype))
    except ResultsError as error:
        fail(error)


def _measure(
    trials: "list[Trial]",
    model: "ModelUnderTest",
    policies: "PolicyStore",
    results: "Results",
    path: Path | None,
    batch: int,
) -> None:
    """Run the trials that have no row yet, and save each row as soon as it is measured.

    All trials are checked first, so that an impossible one fails now and not after hours of others.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from policies.evaluation.measure import TrialError, check_trial, evaluate
    from policies.evaluation.results import ResultsError, add_row
    from policies.evaluation.sampler_spec import sampler_label
    from policies.serving.resources import resources_of
    from samplers import ParameterError, SamplerError

    resources = resources_of(policies)

    @contextmanager
    def refusing(trial: "Trial") -> Iterator[str]:
        """Name a trial for messages and turn its errors into the end of the command."""
        block = "full" if trial.block_length is None else f"block {trial.block_length}"
        spec = trial.sampler
        label = sampler_label(spec.name, spec.stated(), spec.stated_modifiers())
        what = f"{trial.task.name}, {block}, {label}"
        try:
            yield what
        except TrialError as error:
            wrong("--count/--gen-length", error)
        except ParameterError as error:
            wrong("--sampler", f"{what}: {error}")
        except (SamplerError, ResultsError, OSError) as error:
            fail_with_cause(error, what)

    missing = [trial for trial in trials if results.find(trial) is None]
    for trial in missing:
        with refusing(trial):
            check_trial(model, trial, resources)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console()) as bar:
        task = bar.add_task("", total=sum(trial.count for trial in missing))
        for trial in missing:
            with refusing(trial) as what:
                bar.update(task, description=what)
                add_row(path, results, evaluate(model, trial, batch, lambda: bar.advance(task), resources))
