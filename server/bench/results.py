"""Ratios of alternating measurements, and the file with the results."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from policies.files.atomic import write_file
from server.runtime.threads import run_in_own_thread

Measure = Callable[[], float]
"""Runs one measurement. Returns its value: seconds, or tokens per second."""


@dataclass(frozen=True)
class Result:
    """A ratio: median, quartiles, unit and details."""

    name: str
    ratio: float
    low: float
    high: float
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """An absolute number with its unit and details."""

    name: str
    value: float
    unit: str
    detail: dict[str, Any] = field(default_factory=dict)


def timed(work: Callable[[], object]) -> Measure:
    """Measurement of the seconds that a piece of work takes."""

    def measured() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measured


def alternate(first: Measure, second: Measure, rounds: int) -> tuple[list[float], list[float]]:
    """Values of both measurements, run alternately in threads of their own, after one round of warm-up."""
    run_in_own_thread(first)
    run_in_own_thread(second)
    found = [(run_in_own_thread(first), run_in_own_thread(second)) for _ in range(rounds)]
    return [a for a, _ in found], [b for _, b in found]


def ratio_of(name: str, unit: str, over: list[float], under: list[float], **detail: Any) -> Result:
    """Median of over / under, round by round."""
    return spread(name, unit, [a / b for a, b in zip(over, under, strict=True)], **detail)


def spread(name: str, unit: str, ratios: list[float], **detail: Any) -> Result:
    """Median and quartiles of ratios."""
    # Inclusive stays within the measured ratios. The default extrapolates from few rounds, even below zero.
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in detail.items()}
    return Result(name, round(middle, 4), round(low, 4), round(high, 4), unit, rounded | {"rounds": len(ratios)})


def write_results(path: Path, machine: dict[str, Any], results: Iterable[Result | Figure]) -> None:
    content = {"machine": machine, "results": [asdict(result) for result in results]}
    write_file(path, json.dumps(content, indent=1) + "\n")
