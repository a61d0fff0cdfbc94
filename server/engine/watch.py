"""Detection of samplers that do not return. They cannot be ended, so the supervisor of the process must be notified."""

import sys
import threading
import time
import traceback

from samplers import Sampler
from samplers.loop.guard import FRAMES, name_of

PATIENCE = 60.0
"""Maximum seconds that samplers may take for a step; they normally take milliseconds."""
LOOKS = 1.0
"""Maximum seconds counted between two looks, so that time during which the process was stopped does not count."""


class Watch:
    """Watchdog over a thread's calls to samplers, which it makes between `begin` and `end`."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._asking: object | None = None
        self._seen: object | None = None
        self._looked = self._waited = 0.0

    def begin(self) -> None:
        """Mark the start of calls to samplers."""
        self._asking = object()

    def end(self) -> None:
        """Mark their end."""
        self._asking = None

    def look(self) -> bool:
        """True if the thread has not returned in time. Call this more often than every `LOOKS` seconds."""
        now, asking = time.monotonic(), self._asking
        self._waited = self._waited + min(now - self._looked, LOOKS) if asking is self._seen else 0.0
        self._looked, self._seen = now, asking
        return asking is not None and self._waited > PATIENCE

    def where(self) -> tuple[str, str]:
        """Name of the sampler that the thread is in, and the innermost lines of its traceback."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = "".join(traceback.format_stack(frame, FRAMES)) if frame is not None else ""
        while frame is not None:
            if isinstance(sampler := frame.f_locals.get("sampler"), Sampler):
                return name_of(sampler), lines
            frame = frame.f_back
        return "(unknown)", lines
