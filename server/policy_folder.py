"""A folder of policies, watched: each subfolder that holds one is loaded, and loaded again when it changes."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from policies.checkpoint import CARD, NAME, WEIGHTS, PolicyError
from policies.store import PolicyStore, UnknownPolicyError

log = structlog.get_logger(__name__)

SECONDS = 1.0
"""Between two looks at the folder."""

Signature = tuple[tuple[int, int], ...]


@dataclass
class PolicyFolder:
    """Keeps a store in step with a folder. A policy that cannot be loaded leaves the one before it in service."""

    policies: PolicyStore
    folder: Path
    _seen: dict[str, Signature] = field(default_factory=dict)
    _readable: bool = True

    def look(self) -> None:
        """Load what is new or has changed, forget what is gone."""
        found = self._signatures()
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            try:
                self.policies.remove(name)
                log.info("policy is gone", policy=name)
            except UnknownPolicyError:
                pass  # removed over HTTP before
        for name, signature in found.items():
            if self._seen.get(name) == signature:
                continue
            self._seen[name] = signature
            try:
                self.policies.load(name, self.folder / name)
                log.info("policy loaded", policy=name)
            except PolicyError as error:
                log.warning("policy not loaded", policy=name, error=str(error))

    def _signatures(self) -> dict[str, Signature]:
        """Each subfolder that looks like a policy, and how its files stand."""
        found: dict[str, Signature] = {}
        try:
            folders = sorted(self.folder.iterdir())
        except OSError as error:
            if self._readable:  # said once, not every second
                log.warning("cannot read the folder of policies", folder=str(self.folder), error=error.strerror)
            self._readable = False
            return dict(self._seen)
        self._readable = True
        for folder in folders:
            if NAME.fullmatch(folder.name) is None:
                continue
            try:
                stats = [(folder / name).stat() for name in (CARD, WEIGHTS)]
            except OSError:
                continue
            found[folder.name] = tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
        return found


@contextmanager
def watching(policies: PolicyStore, folder: str | None) -> Iterator[None]:
    """Look at a folder of policies now, and every second from now on in a thread of its own."""
    if folder is None:
        yield
        return
    watched = PolicyFolder(policies, Path(folder))
    watched.look()
    stop = threading.Event()

    def look_again() -> None:
        while not stop.wait(SECONDS):
            watched.look()

    thread = threading.Thread(target=look_again, name="policy-folder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
