"""A watched folder of policies: each subfolder with a policy is loaded, and loaded again when it changes."""

import heapq
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from policies.serving.checkpoint import CARD, NAME, NEXT, WEIGHTS, PolicyError
from policies.serving.store import PolicyStore, UnknownPolicyError

log = structlog.get_logger(__name__)

SECONDS = 1.0
"""Shortest pause between two looks at the folder."""
SHARE = 20
"""Ratio of the pause after a look to the duration of the look, at least."""
MOST = 1000
"""Most subfolders that are looked at, the first ones by name."""

Signature = tuple[tuple[int, ...] | None, ...]


class FolderMetrics(Protocol):
    """Metrics of a watched folder."""

    def policy_folder_seen(self, at: float) -> None:
        """The folder was looked at, to its end, at this Unix time."""

    def policies(self, count: int) -> None:
        """Number of policies that are loaded now."""

    def policy_load_failed(self) -> None:
        """A policy could not be loaded."""


@dataclass
class PolicyFolder:
    """Keeps a store in step with a folder. A policy that cannot be loaded leaves the one before it in service.

    Attributes:
        metrics: counts failed loads and completed looks.
    """

    policies: PolicyStore
    folder: Path
    metrics: FolderMetrics | None = None
    _seen: dict[str, Signature] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        """Load what is new or has changed, forget what is gone. Never raises: the next look may succeed."""
        try:
            names = self._names()
            for name in self._seen.keys() - names:
                self._forget(name)
            for name in sorted(names):
                self._follow(name)
        except Exception as error:
            self._tell("", "cannot read the folder of policies", error)
            return
        self._told.pop("", None)
        if self.metrics is not None:
            self.metrics.policy_folder_seen(time.time())
            self.metrics.policies(len(self.policies.list()))

    def _names(self) -> set[str]:
        """Subfolders that may be policies. Raises OSError."""
        with os.scandir(self.folder) as entries:
            names = heapq.nsmallest(MOST + 1, (entry.name for entry in entries if NAME.fullmatch(entry.name)))
        if len(names) > MOST:
            self._tell(":", "the folder of policies has too many entries", f"only the first {MOST} are looked at")
        else:
            self._told.pop(":", None)
        return set(names[:MOST])

    def _follow(self, name: str) -> None:
        """Load the policy of a subfolder unless its files are as they were at the last look."""
        folder = self.folder / name
        try:
            card, weights, both = signature = tuple(_stands(folder / file) for file in (CARD, WEIGHTS, NEXT))
            if not any(signature):
                self._forget(name)
                return
            if self._seen.get(name) == signature or not ((card and weights) or both):  # the rest may be on its way
                return
            self.policies.load(name, folder, within=self.folder)
        except Exception as error:
            if isinstance(error, PolicyError) and error.__cause__ is None:
                self._seen[name] = signature  # what is wrong with its files will not change before they do
            if self._tell(name, "policy not loaded", error) and self.metrics is not None:
                self.metrics.policy_load_failed()
            return
        self._seen[name] = signature
        self._told.pop(name, None)
        log.info("policy loaded", policy=name)

    def _forget(self, name: str) -> None:
        self._told.pop(name, None)
        if self._seen.pop(name, None) is None:
            return
        try:
            self.policies.remove(name)
            log.info("policy is gone", policy=name)
        except UnknownPolicyError:
            pass  # removed over HTTP before, or never loaded

    def _tell(self, about: str, what: str, why: object) -> bool:
        """Log why something cannot be done, unless the last look logged the same; returns whether it was logged."""
        said = f"{type(why).__name__}: {why}"[:500] if isinstance(why, Exception) else str(why)
        if self._told.get(about) == said:
            return False
        self._told[about] = said
        log.warning(what, folder=str(self.folder / about.strip(":")), error=said)
        return True


def _stands(path: Path) -> tuple[int, ...] | None:
    """Signature that changes whenever a file does; None if there is no file. Raises OSError if it cannot be told."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


@contextmanager
def watching(policies: PolicyStore, folder: str | None, metrics: FolderMetrics | None = None) -> Iterator[None]:
    """Look at a folder of policies now, and then regularly in a thread of its own."""
    if folder is None:
        yield
        return
    watched = PolicyFolder(policies, Path(folder), metrics)
    stop = threading.Event()
    took = _timed(watched)

    def look_again(took: float) -> None:
        while not stop.wait(pause_after(took)):
            took = _timed(watched)

    thread = threading.Thread(target=look_again, args=(took,), name="policy-folder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def pause_after(took: float) -> float:
    """Seconds until the next look, after one that took `took` seconds."""
    return max(SECONDS, SHARE * took)


def _timed(watched: PolicyFolder) -> float:
    """Look, and return the seconds that it took."""
    began = time.monotonic()
    watched.look()
    return time.monotonic() - began
