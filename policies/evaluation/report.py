"""Measurements as text: a table for the terminal, and Markdown for a README or a model card."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from rich.table import Table

from policies.evaluation.measure import Measurement
from policies.evaluation.sampler_spec import sampler_label
from samplers import CacheMode


@dataclass(frozen=True)
class DecodingSetting:
    """Conditions that the rows of one table share. Without a `block_length` it is full diffusion."""

    block_length: int | None
    fill_after_end: bool
    count: int
    seed: int
    cache: CacheMode

    @classmethod
    def of(cls, row: Measurement) -> "DecodingSetting":
        return cls(row.block_length, row.fill_after_end, row.count, row.seed, row.cache)

    def title(self) -> str:
        where = "Full diffusion" if self.block_length is None else f"Blocks of {self.block_length}"
        filling = "" if self.fill_after_end else ", padding denoised like text"
        return f"{where}{filling}{kept(self.cache)}; {self.count} held-out problems a task (seed {self.seed})"


def kept(cache: CacheMode) -> str:
    """Remark on the cache, empty without one."""
    return "" if cache is CacheMode.NONE else f", {cache} cache"


def by_setting(rows: list[Measurement]) -> dict[DecodingSetting, list[Measurement]]:
    """Group rows by setting, in the order in which they were measured."""
    groups: dict[DecodingSetting, list[Measurement]] = {}
    for row in rows:
        groups.setdefault(DecodingSetting.of(row), []).append(row)
    return groups


def column(row: Measurement) -> str:
    """The task and how many positions it was given."""
    return f"{row.task} ({row.gen_length})"


def label(row: Measurement) -> str:
    """The sampler and its parameters."""
    return sampler_label(row.sampler, row.params, row.modifiers)


def all_at_once(rows: Iterable[Measurement]) -> str:
    """Remark for rows whose `k` allows every position at once, empty if one of them does not."""
    unlimited = (row.sampler in ("random", "topk") and row.params.get("k", 1) >= row.gen_length for row in rows)
    return " (all at once)" if all(unlimited) else ""


EXPLANATION = (
    "Accuracy in % [Wilson 95 % interval] / tokens per forward. In parentheses: positions of the generation region.\n"
)


def cell(row: Measurement) -> str:
    """Accuracy in % with its 95 % interval / tokens per forward."""
    accuracy, low, high = (100 * share for share in (row.accuracy, row.accuracy_low, row.accuracy_high))
    return f"{accuracy:.1f} [{low:.1f}-{high:.1f}] / {row.tpf:.2f}"


def markdown(rows: list[Measurement]) -> str:
    """One table per setting: a line per sampler, a column per task, cells as `cell` writes them."""
    parts = [EXPLANATION]
    for setting, group in by_setting(rows).items():
        columns = list(dict.fromkeys(map(column, group)))
        lines = [
            f"**{setting.title()}**",
            "",
            f"| sampler | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        samplers: dict[str, dict[str, Measurement]] = {}
        for row in group:
            samplers.setdefault(label(row), {})[column(row)] = row
        for name, found in samplers.items():
            cells = [cell(found[task]) if task in found else "" for task in columns]
            lines.append(f"| {name}{all_at_once(found.values())} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def table(rows: list[Measurement]) -> Table:
    """Table for the terminal, one line per measurement."""
    shown = Table("task", "block", "sampler", title="accuracy against tokens per forward")
    for name in ("correct", "accuracy %", "95 %", "tokens", "forwards", "TPF", "seconds"):
        shown.add_column(name, justify="right", no_wrap=True)
    for _, group in groupby(rows, key=lambda row: (DecodingSetting.of(row), row.task)):
        for row in group:
            block = "full" if row.block_length is None else str(row.block_length)
            interval = f"{100 * row.accuracy_low:.1f}-{100 * row.accuracy_high:.1f}"
            counts = (f"{row.correct}/{row.count}", f"{100 * row.accuracy:.1f}", interval)
            sampler = label(row) + all_at_once([row])
            effort = (str(row.tokens), str(row.forwards), f"{row.tpf:.2f}", f"{row.seconds:.1f}")
            shown.add_row(
                row.task,
                block + kept(row.cache) + ("" if row.fill_after_end else " *"),
                sampler,
                *counts,
                *effort,
            )
        shown.add_section()
    if not all(row.fill_after_end for row in rows):
        shown.caption = "* padding after the end of the text denoised like text"
    return shown
