"""`unmask bench`: measurements taken in one run on this machine."""

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.commands.options import MOST_COUNT, Threads, check_file, progress_console, use_threads

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.bench.results import Figure, Result

Json = Annotated[Path | None, typer.Option("--json", help="Write the results there.", metavar="FILE")]
Rounds = Annotated[
    int, typer.Option("--rounds", min=1, max=MOST_COUNT, help="Rounds in which both sides of a ratio are measured.")
]
Steps = Annotated[int, typer.Option("--steps", min=1, max=MOST_COUNT, help="Steps that each median is of.")]
Small = Annotated[bool, typer.Option("--embedded-only", help="Leave out the random model of 100 M weights.")]


def register(app: typer.Typer) -> None:
    commands = typer.Typer(
        help="Measure on this machine: ratios of two things that alternate in one run; times of steps."
    )
    commands.command("engine")(engine)
    commands.command("http")(http)
    commands.command("sampler")(sampler)
    app.add_typer(commands, name="bench")


def engine(json: Json = None, rounds: Rounds = 5, embedded_only: Small = False, threads: Threads = None) -> None:
    """The engine alone: its model against bare products, against a plain loop, by parts; how a forward grows."""
    from server.bench.curves import measure_growth
    from server.bench.engine import measure_engine
    from server.bench.subjects import embedded, random_model
    from server.runtime.threads import run_in_own_thread

    check_file("--json", json)
    use_threads(threads)

    def results() -> "Iterable[Result]":
        yield from measure_engine(run_in_own_thread(lambda: embedded(16)), rounds)
        if not embedded_only:
            yield from measure_engine(run_in_own_thread(lambda: random_model(16)), rounds)
            yield from measure_growth(rounds)

    _report(results(), json)


def http(json: Json = None, rounds: Rounds = 5, embedded_only: Small = False, threads: Threads = None) -> None:
    """The API over a socket, streaming, against the engine alone."""
    from server.bench.http import measure_http
    from server.bench.subjects import embedded, random_model, write_random_model
    from server.runtime.threads import run_in_own_thread

    check_file("--json", json)
    use_threads(threads)

    def results() -> "Iterable[Result]":
        yield from measure_http(run_in_own_thread(lambda: embedded(16)), None, rounds, (1, 16), threads)
        if not embedded_only:
            with tempfile.TemporaryDirectory() as folder:
                subject = run_in_own_thread(lambda: random_model(16))
                write_random_model(subject, Path(folder))
                yield from measure_http(subject, Path(folder), rounds, (1, 16), threads)

    _report(results(), json)


def sampler(json: Json = None, steps: Steps = 60) -> None:
    """The denoising loop alone, without a model, on one thread: milliseconds a step, by sampler and number of rows."""
    from server.bench.sampler import measure_sampler

    check_file("--json", json)
    use_threads(1)
    _report(measure_sampler(steps=steps), json)


def _report(results: "Iterable[Result | Figure]", json: Path | None) -> None:
    """Print the machine and each result as it comes, and write all of them to the file."""
    from server.bench.machine import in_words, machine
    from server.bench.results import Result, write_results
    from server.runtime.waiting import CALM_READINGS, READING_PERIOD

    measured_on = machine()
    typer.echo(in_words(measured_on))
    # Reading the CPU's features took another process, next to which idle threads sleep. Wait until they spin again.
    time.sleep((CALM_READINGS + 2) * READING_PERIOD)
    found: list[Result | Figure] = []
    with progress_console().status("measuring"):
        for result in results:
            found.append(result)
            if isinstance(result, Result):
                spread = f"{result.low:.3f} ... {result.high:.3f}"
                typer.echo(f"{result.detail['model']}: {result.name} {result.ratio:.3f} ({spread}), {result.unit}")
            else:
                about = ", ".join(f"{key} {value}" for key, value in result.detail.items())
                typer.echo(f"{about}: {result.value:.3f} {result.unit}")
    if json is not None:
        write_results(json, measured_on, found)
