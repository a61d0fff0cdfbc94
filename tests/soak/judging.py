"""What a server must hold when it has been asked much and is left alone again."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.soak.reading import Reading

GROWTH = 0.05
"""Part of its memory by which a process that is warm may grow."""
SLACK = {"descriptors": 4, "threads": 40, "children": 0, "tasks": 2}
"""How many more there may be at the end than when the process was warm. Pools of threads (anyio's has up to 40) fill up
as requests happen to meet; what leaks comes to more over a soak."""


@dataclass
class Outcome:
    """A soak of one server.

    Attributes:
        start: before the first request.
        warm: after some of them, when nothing ran any more.
        end: after all of them, likewise.
        requests: sent, by what they were for.
        since: requests since it was warm.
        statuses: answers by status.
        faults: what no client may see and no log may hold.
    """

    name: str
    start: Reading
    warm: Reading
    end: Reading
    requests: dict[str, int] = field(default_factory=dict)
    since: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """KVSlot at the end over what it was when warm, less one."""
        return self.end.memory / self.warm.memory - 1


def judge(outcome: Outcome, growth: float = GROWTH) -> Iterator[str]:
    """All that is wrong."""
    yield from outcome.faults
    if outcome.growth >= growth:
        yield f"memory grew by {outcome.growth:.1%} over {outcome.since:,} requests"
    for name, slack in SLACK.items():
        now, before = getattr(outcome.end, name), getattr(outcome.warm, name)
        if now > before + slack:
            yield f"{name} grew from {before} to {now}"
    for name in ("running", "waiting"):
        if left := getattr(outcome.end, name):
            yield f"{left} generations are {name} after the last request"
    if not outcome.statuses.get(200):
        yield "no request was answered"


def table(outcome: Outcome) -> str:
    """Readings as people read them."""
    rows = [(name, *(getattr(reading, name) for reading in _readings(outcome))) for name in Reading.__annotations__]
    lines = [f"{outcome.name:12}{'start':>10}{'warm':>10}{'end':>10}"]
    for name, *values in rows:
        shown = [f"{value / 1e6:.1f}" for value in values] if name == "memory" else map(str, values)
        lines.append(f"{'memory, MB' if name == 'memory' else name:12}" + "".join(f"{value:>10}" for value in shown))
    told = ", ".join(f"{count:,} {name}" for name, count in sorted(outcome.requests.items()))
    answers = ", ".join(f"{status}: {count:,}" for status, count in sorted(outcome.statuses.items()))
    lines += [f"memory {outcome.growth:+.2%} over {outcome.since:,} requests since warm", told, f"answers {answers}"]
    return "\n".join(lines)


def _readings(outcome: Outcome) -> tuple[Reading, Reading, Reading]:
    return outcome.start, outcome.warm, outcome.end
