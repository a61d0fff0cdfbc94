"""A folder of policies, watched: each subfolder that holds one is loaded, and loaded again when it changes."""

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
"""Between two looks at the folder, at least."""
SHARE = 20
"""The pause after a look is at least so many times as long as the look itself took."""
MOST = 1000
"""Subfolders that are looked at, the first ones by name."""

Signature = tuple[tuple[int, ...] | None, ...]


class FolderMetrics(Protocol):
    """Where a watched folder counts what it sees."""

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
        metrics: where loads that fail, and looks that do not, are counted.
    """

    policies: PolicyStore
    folder: Path
    metrics: FolderMetrics | None = None
    _seen: dict[str, Signature] = field(default_factory=dict)
    _told: dict[str, str] = field(default_factory=dict)

    def look(self) -> None:
        """Load what is new or has changed, forget what is gone. Never raises: the next look may be a better one."""
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
        """Load the policy of a subfolder unless it stands as it did when it was looked at last."""
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
        """Log why something cannot be done, unless that was said the last time too; whether it was said now."""
        said = f"{type(why).__name__}: {why}"[:500] if isinstance(why, Exception) else str(why)
        if self._told.get(about) == said:
            return False
        self._told[about] = said
        log.warning(what, folder=str(self.folder / about.strip(":")), error=said)
        return True


def _stands(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none. Raises OSError if that cannot be known."""
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size


@contextmanager
def watching(policies: PolicyStore, folder: str | None, metrics: FolderMetrics | None = None) -> Iterator[None]:
    """Look at a folder of policies now, and again and again from now on in a thread of its own."""
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
    """Seconds until the next look, after one that took so many."""
    return max(SECONDS, SHARE * took)


def _timed(watched: PolicyFolder) -> float:
    """Look; how many seconds it took."""
    began = time.monotonic()
    watched.look()
    return time.monotonic() - began
