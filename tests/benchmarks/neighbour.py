"""Requests beside a program that keeps a processor busy, over the same without it.

python -m tests.benchmarks.neighbour [--neighbours 1] [--requests 1] [--rounds 5] [--json FILE]
Four settings take turns, over HTTP and in the engine alone, each in a process of its own: OpenMP's default, in which
threads wait for each other awake; waiting asleep; one thread; and what Unmask does by itself. In every round each
answers without neighbours, then with them. Answers are 64 tokens of the embedded model in 32 steps.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from server.bench.engine import TimedEngine
from server.bench.http import serving, stream_all
from server.bench.machine import in_words, machine
from server.bench.results import Measure
from server.bench.subjects import BenchModel, embedded
from server.commands.options import use_threads
from server.runtime.threads import run_in_own_thread
from server.runtime.waiting import CALM_READINGS, POLICY_VARIABLES, READING_PERIOD

SETTINGS: dict[str, tuple[dict[str, str], int | None]] = {
    "awake": ({"GOMP_SPINCOUNT": "300000"}, None),
    "asleep": ({"OMP_WAIT_POLICY": "passive"}, None),
    "one thread": ({}, 1),
    "unmask": ({}, None),
}
"""Environment and number of threads. The first is what GNU's library does where nothing is said."""
BUSY = [sys.executable, "-c", "while True: pass"]


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Programs that compute, for long enough to be noticed before and forgotten after."""
    started = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        time.sleep(3 * READING_PERIOD)
        yield
    finally:
        for each in started:
            each.kill()
            each.wait()
        time.sleep((CALM_READINGS + 2) * READING_PERIOD)


@contextmanager
def engine_alone(requests: int, environment: dict[str, str], threads: int | None) -> Iterator[Measure]:
    """An engine in a process of its own; seconds of so many requests at once."""
    command = [sys.executable, "-m", "tests.benchmarks.neighbour", "--child", "--requests", str(requests)]
    command += [] if threads is None else ["--threads", str(threads)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    )
    assert child.stdin is not None and child.stdout is not None
    asks, answers = child.stdin, child.stdout

    def seconds() -> float:
        asks.write("\n")
        asks.flush()
        return float(answers.readline())

    try:
        yield seconds
    finally:
        asks.close()
        child.wait()


def answer_asks(requests: int, threads: int | None) -> None:
    """What the process of `engine_alone` does: one measurement for every line."""
    use_threads(threads)
    subject = run_in_own_thread(lambda: embedded(16))
    running = TimedEngine(subject)
    for _ in sys.stdin:
        asked = running.requests(subject.prompts[:requests], "topk", {"steps": subject.steps}, False)
        print(running.run(asked)[0], flush=True)


@contextmanager
def over_http(
    subject: BenchModel, requests: int, environment: dict[str, str], threads: int | None
) -> Iterator[Measure]:
    """A server of its own; seconds of so many streams at once."""
    with serving(None, threads, environment) as url:

        def seconds() -> float:
            began = time.perf_counter()
            asyncio.run(stream_all(url, subject, subject.prompts[:requests]))
            return time.perf_counter() - began

        yield seconds


def measure(measures: dict[str, Measure], count: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Every setting without and with neighbours, round by round."""
    for each in measures.values():
        each()
    free: dict[str, list[float]] = {name: [] for name in measures}
    beside: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, each in measures.items():
            time.sleep((CALM_READINGS + 2) * READING_PERIOD)  # the setting before was a neighbour too
            free[name].append(each())
        with neighbours(count):
            for name, each in measures.items():
                beside[name].append(each())
    return {
        name: {
            "seconds_free": statistics.median(free[name]),
            "seconds_beside": statistics.median(beside[name]),
            "ratio": statistics.median(b / a for a, b in zip(free[name], beside[name], strict=True)),
            "beside_over_asleep": statistics.median(b / a for a, b in zip(beside["asleep"], beside[name], strict=True)),
            "free_over_awake": statistics.median(b / a for a, b in zip(free["awake"], free[name], strict=True)),
        }
        for name in measures
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        answer_asks(arguments.requests, arguments.threads)
        return
    for variable in POLICY_VARIABLES:
        os.environ.pop(variable, None)
    measured_on = machine()
    print(in_words(measured_on))
    print(f"{arguments.requests} requests, {arguments.neighbours} neighbours, medians of {arguments.rounds} rounds")
    subject = run_in_own_thread(lambda: embedded(16))
    ways: dict[str, Callable[[dict[str, str], int | None], Any]] = {
        "engine": lambda environment, threads: engine_alone(arguments.requests, environment, threads),
        "http": lambda environment, threads: over_http(subject, arguments.requests, environment, threads),
    }
    results = {}
    for way, start in ways.items():
        with ExitStack() as stack:
            measures = {name: stack.enter_context(start(*setting)) for name, setting in SETTINGS.items()}
            results[way] = measure(measures, arguments.neighbours, arguments.rounds)
        for name, found in results[way].items():
            print(
                f"{way:>6} {name:<10}  free {found['seconds_free']:.2f} s ({found['free_over_awake']:.2f} of awake)  "
                f"beside {found['seconds_beside']:.2f} s ({found['beside_over_asleep']:.2f} of asleep)  "
                f"ratio {found['ratio']:.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": measured_on, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
