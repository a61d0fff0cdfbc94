"""Who waits, who runs, and who takes part in the next forward."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.generation import Generation


@dataclass(frozen=True)
class Limits:
    """Attributes:
    rows: generations that run.
    queue: generations that wait.
    tokens: tokens of one forward, over all its rows.
    """

    rows: int = 16
    queue: int = 256
    tokens: int = 8192


@dataclass
class Scheduler:
    """Admits by priority, then by arrival; shares out forwards by tokens.

    A forward computes at most `limits.tokens`. Where not all that run fit, those go first for which the fewest tokens
    were computed so far, so that a long canvas and a short one get equally many tokens a second: neither starves, and a
    short one takes part more often; what is left of a forward goes to whoever fits. Who is admitted starts level with
    who has had least.
    The caller sees to it that no canvas is longer than a forward, and that one thread at a time is in here.
    """

    limits: Limits = field(default_factory=Limits)
    waiting: list[Generation] = field(default_factory=list)
    running: list[Generation] = field(default_factory=list)

    def room(self, count: int) -> bool:
        """Whether so many more may wait."""
        return len(self.waiting) + count <= self.limits.queue

    def add(self, generations: Iterable[Generation]) -> None:
        """Queue them; among equal priorities in this order."""
        for generation in generations:
            insort(self.waiting, generation, key=lambda each: each.request.priority)

    def admit(self) -> Iterator[Generation]:
        """Let the first that wait run as long as there are rows for them."""
        while self.waiting and len(self.running) < self.limits.rows:
            generation = self.waiting.pop(0)
            generation.served = min((each.served for each in self.running), default=0)
            self.running.append(generation)
            yield generation

    def pick(self) -> list[Generation]:
        """Those that take part in the next forward, in the order in which they were admitted."""
        left = self.limits.tokens
        chosen: set[int] = set()
        for generation in sorted(self.running, key=lambda each: each.served):
            if (cost := generation.cost) > left:
                continue
            left -= cost
            generation.served += cost
            chosen.add(id(generation))
        return [generation for generation in self.running if id(generation) in chosen]

    def remove(self, generation: Generation) -> None:
        """Take it out, wherever it is."""
        (self.running if generation in self.running else self.waiting).remove(generation)

    def clear(self) -> list[Generation]:
        """Take all out."""
        left = [*self.running, *self.waiting]
        self.running, self.waiting = [], []
        return left
