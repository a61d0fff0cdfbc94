"""A request on its way through the engine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from samplers.denoising import Denoising
from server.engine.request import Event, GenerationRequest

Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Generation:
    """A request, its row of the loop, and what became of it. Its events go to `deliver`, on the engine's thread.

    Attributes:
        submitted, first_token: when, by the monotonic clock.
        cancelled: it is to end, because nobody waits for it any more.
        counted: tokens that count as generated and were told so far.
        served: tokens that forwards computed for it, and what it was given at its admission (see `Scheduler`).
    """

    request: GenerationRequest
    deliver: Deliver
    row: Denoising
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    cancelled: bool = False
    counted: int = 0
    served: int = 0

    @property
    def deadline(self) -> float:
        timeout = self.request.timeout
        return self.submitted + timeout if timeout is not None else float("inf")

    @property
    def cost(self) -> int:
        """Tokens that its next forward computes."""
        fed = self.row.feed()
        return fed.stop - fed.start
