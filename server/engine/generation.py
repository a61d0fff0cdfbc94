"""A request on its way through the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from samplers.loop.row import Row
from server.engine.request import Event, GenerationRequest

Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Generation:
    """A request, its row of the loop, and what became of it. Its events go to `deliver`, on the engine's thread.

    Attributes:
        submitted, first_token: when, by the monotonic clock.
        cancelled: it is to end, because nobody waits for it any more.
        ended: its end was told.
        counted: tokens that count as generated and were told so far.
        forwards: forward passes that were told so far.
        rows: canvases that its forwards compute at most.
        memories: canvases of which something is kept between forwards: keys and values.
        work: most tokens that forwards compute for it, known before the first.
        started: when it had its first forward.
        begun: its number among those that had one (see `Scheduler`), None until then.
        served: tokens that forwards computed for it, and what it was given so as to be level with others.
    """

    request: GenerationRequest
    deliver: Deliver
    row: Row
    work: int = 0
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    cancelled: bool = False
    ended: bool = False
    counted: int = 0
    forwards: int = 0
    started: float | None = None
    begun: int | None = None
    served: int | None = None
    rows: int = field(init=False)
    memories: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.row.passes
        self.memories = self.rows if self.row.keeps else 0

    @property
    def deadline(self) -> float:
        timeout = self.request.timeout
        return self.submitted + timeout if timeout is not None else float("inf")

    @property
    def cost(self) -> int:
        """Tokens that its next forward computes."""
        return self.row.cost
