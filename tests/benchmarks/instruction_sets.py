"""`unmask bench engine` under two instruction sets that take turns.

python -m tests.benchmarks.instruction_sets [--rounds 3] [--turns 2] [--embedded-only] [--json FILE]
The processor's own, and AVX2, to which the environment of a process keeps torch, oneDNN and MKL. Each number is the
median over the turns, of which every one is a process of its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.bench.machine import in_words
from server.bench.results import Result

SETS: dict[str, dict[str, str]] = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def turn(environment: dict[str, str], rounds: int, embedded_only: bool, threads: int | None) -> dict[str, Any]:
    """One run in a process of its own, as its JSON file has it."""
    command = [sys.executable, "-m", "tests.benchmarks.instruction_sets", "--child", "--rounds", str(rounds)]
    command += ["--embedded-only"] if embedded_only else []
    command += [] if threads is None else ["--threads", str(threads)]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(rounds: int, embedded_only: bool, threads: int | None) -> dict[str, Any]:
    """What a turn's process does."""
    from server.bench.curves import measure_growth
    from server.bench.engine import measure_engine
    from server.bench.machine import machine
    from server.bench.subjects import embedded, random_model
    from server.commands.options import use_threads
    from server.runtime.threads import run_in_own_thread

    use_threads(threads)

    def results() -> Iterator[Result]:
        yield from measure_engine(run_in_own_thread(lambda: embedded(16)), rounds)
        if not embedded_only:
            yield from measure_engine(run_in_own_thread(lambda: random_model(16)), rounds)
            yield from measure_growth(rounds)

    found: dict[str, Any] = {"machine": machine(), "results": []}
    for result in results():
        found["results"].append({"model": result.detail["model"], "name": result.name, "ratio": result.ratio})
        print(found["results"][-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--embedded-only", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.rounds, arguments.embedded_only, arguments.threads)))
        return
    machines: dict[str, Any] = {}
    ratios: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for _ in range(arguments.turns):
        for name, environment in SETS.items():
            found = turn(environment, arguments.rounds, arguments.embedded_only, arguments.threads)
            machines.setdefault(name, found["machine"])
            for result in found["results"]:
                ratios[result["model"], result["name"]][name].append(result["ratio"])
    for name, measured_on in machines.items():
        print(f"{name}: {in_words(measured_on)}")
    results = [
        {"model": model, "name": name, **{each: statistics.median(values) for each, values in sets.items()}}
        for (model, name), sets in ratios.items()
    ]
    for result in results:
        each = "  ".join(f"{name} {result[name]:>6.3f}" for name in SETS)
        print(f"{result['model']:<12} {result['name']:<32} {each}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machines": machines, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
