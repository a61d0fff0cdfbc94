"""A request in the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from samplers.loop.row import Row
from server.engine.request import Event, GenerationRequest

Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Generation:
    """A request, its row of the loop, and its progress. Its events go to `deliver`, on the engine's thread.

    Attributes:
        submitted, first_token: times by the monotonic clock, in seconds.
        cancelled: True once its client has gone; it ends at the next turn.
        ended: True once its end was delivered.
        counted: number of generated tokens reported so far.
        forwards: number of forward passes reported so far.
        rows: maximum number of canvases in one of its forwards.
        memories: number of canvases whose keys and values are kept between forwards.
        work: maximum tokens that forwards compute for it, known before the first.
        started: time of its first forward.
        begun: its number in the order of first forwards (see `Scheduler`), None before.
        served: tokens computed for it, plus credit added to level it with others.
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
        """Number of tokens that its next forward computes."""
        return self.row.cost
