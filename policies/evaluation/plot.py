"""The frontier as a picture: accuracy against tokens per forward."""

from io import BytesIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from policies.evaluation.measure import Measurement
from policies.evaluation.oracle import Oracle
from policies.evaluation.report import by_setting, column
from policies.files.atomic import write_file

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")


def series(row: Measurement) -> str:
    """Label of the line that a measurement belongs to: its sampler, and the policy if there is one."""
    policy = row.params.get("policy")
    return f"{row.sampler} {policy}" if policy else row.sampler


def pareto_front(rows: list[Measurement]) -> list[Measurement]:
    """The rows that no other beats in both accuracy and tokens per forward, the slowest first."""
    front: list[Measurement] = []
    for row in sorted(rows, key=lambda r: (-r.tpf, -r.accuracy)):
        if not front or row.accuracy > front[-1].accuracy:
            front.append(row)
    return front[::-1]


def draw(rows: list[Measurement], model: str, path: Path) -> None:
    """Write a PNG: a panel for each setting (down) and task (across). The oracle is drawn, but not in the front."""
    settings = by_setting(rows)
    columns = list(dict.fromkeys(map(column, rows)))
    names = list(dict.fromkeys(map(series, rows)))
    figure = Figure(figsize=(max(7.0, 3.4 * len(columns)), 3.1 * len(settings) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(settings), len(columns), sharey=True, squeeze=False)
    for line, (setting, group) in zip(panels, settings.items(), strict=True):
        for axes, task in zip(line, columns, strict=True):
            _panel(axes, [row for row in group if column(row) == task], names)
            axes.set_title(f"{task}, {setting.title().partition(';')[0].lower()}", fontsize=9)
        line[0].set_ylabel("accuracy, %")
    lowest = min((row.accuracy_low for row in rows), default=0.0)
    panels[0][0].set_ylim(max(-3, 100 * lowest - 4), 103)
    for axes in panels[-1]:
        axes.set_xlabel("tokens per forward")
    handles = {handle.get_label(): handle for axes in panels.flat for handle in axes.get_legend_handles_labels()[0]}
    across = min(len(handles), int(figure.get_figwidth() // 1.7))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False)
    figure.suptitle(f"{model}: accuracy against tokens per forward, Wilson 95 % intervals")
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_file(path, picture.getvalue())


def _panel(axes: Axes, rows: list[Measurement], names: list[str]) -> None:
    front = pareto_front([row for row in rows if row.sampler != Oracle.name])
    if front:
        axes.plot(
            [row.tpf for row in front],
            [100 * row.accuracy for row in front],
            color="black",
            linewidth=5,
            alpha=0.15,
            solid_capstyle="round",
            label="Pareto front",
        )
    for i, name in enumerate(names):
        mine = sorted((row for row in rows if series(row) == name), key=lambda row: row.tpf)
        if not mine:
            continue
        accuracy = [100 * row.accuracy for row in mine]
        axes.errorbar(
            [row.tpf for row in mine],
            accuracy,
            yerr=(
                [100 * (row.accuracy - row.accuracy_low) for row in mine],
                [100 * (row.accuracy_high - row.accuracy) for row in mine],
            ),
            label=name,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tpf, _: f"{tpf:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if rows and max(row.tpf for row in rows) < 4 * min(row.tpf for row in rows):
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
    axes.grid(alpha=0.3)
