"""Notice a sampler that does not come back. Nothing can end it, so whoever looks after the process has to be told."""

import sys
import threading
import time
import traceback

from samplers import Sampler
from samplers.loop.guard import FRAMES, name_of

PATIENCE = 60.0
"""Seconds that samplers may take for a step; they take milliseconds."""
LOOKS = 1.0
"""Most seconds that count between two looks: a process that was stopped in between has not been waiting."""


class Watch:
    """Whether a thread comes back from what it asks of samplers, which it does between `begin` and `end`."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._asking: object | None = None
        self._seen: object | None = None
        self._looked = self._waited = 0.0

    def begin(self) -> None:
        """From now on samplers are asked."""
        self._asking = object()

    def end(self) -> None:
        """They have answered."""
        self._asking = None

    def look(self) -> bool:
        """Whether it has been away for too long, by those who look, which should be more often than `LOOKS`."""
        now, asking = time.monotonic(), self._asking
        self._waited = self._waited + min(now - self._looked, LOOKS) if asking is self._seen else 0.0
        self._looked, self._seen = now, asking
        return asking is not None and self._waited > PATIENCE

    def where(self) -> tuple[str, str]:
        """The name of the sampler that the thread is in, and the innermost lines of where that is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = "".join(traceback.format_stack(frame, FRAMES)) if frame is not None else ""
        while frame is not None:
            if isinstance(sampler := frame.f_locals.get("sampler"), Sampler):
                return name_of(sampler), lines
            frame = frame.f_back
        return "(unknown)", lines
