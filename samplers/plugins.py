"""Classes that other distributions add through entry points. A broken one is skipped; the rest still work."""

import logging
import re
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Generic, TypeVar

from samplers.loop.guard import is_interrupt, shown

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOW = 10.0
"""Seconds of loading after which a warning names the entry point being loaded."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class BrokenPlugin:
    """An entry point that could not be used, its distribution, and a one-line reason."""

    name: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class Plugins(Generic[T]):
    """Objects loaded from the entry points of a group, by name, and the entry points that failed."""

    found: dict[str, T]
    broken: dict[str, BrokenPlugin]


def load_plugins(group: str, base: type[T], taken: Collection[str], check: Callable[[T], object]) -> Plugins[T]:
    """Make one object of each class named by the group's entry points. Log a warning for each one skipped.

    Args:
        base: required base class; the `name` of each class must be that of its entry point.
        taken: names already in use.
        check: called with each object; raises if it cannot be used.
    """
    plugins = Plugins[T]({}, {})
    for entry in _entries(group):
        # A hanging import cannot be ended; the warning tells the user who waits or presses Ctrl-C what hangs.
        slow = threading.Timer(
            SLOW, log.warning, ("%s %r of %s takes long to load", group, entry.name, _distribution(entry))
        )
        slow.daemon = True
        slow.start()
        try:
            plugins.found[entry.name] = _made(entry, base, {*taken, *plugins.found}, check)
        except BaseException as error:  # a module that exits, or a native one that panics, must not end the process
            if is_interrupt(error):
                raise
            broken = BrokenPlugin(entry.name, _distribution(entry), _one_line(error))
            log.warning("%s %r of %s is skipped: %s", group, broken.name, broken.distribution, broken.reason)
            if entry.name not in taken:
                plugins.broken.setdefault(entry.name, broken)
        finally:
            slow.cancel()
    for name in plugins.found:
        plugins.broken.pop(name, None)
    return plugins


def _entries(group: str) -> EntryPoints | tuple[()]:
    try:
        return entry_points(group=group)
    except Exception as error:  # unreadable metadata of one distribution fails the search for all
        log.warning("no %s are loaded, because entry points cannot be read: %s", group, _one_line(error))
        return ()


def _made(entry: EntryPoint, base: type[T], taken: Collection[str], check: Callable[[T], object]) -> T:
    if not _NAME.fullmatch(entry.name):
        raise ValueError("a name has at most 64 letters, digits, '_', '-' and '.', the first a letter or digit")
    if entry.name in taken:
        raise ValueError("the name is already in use")
    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise TypeError(f"{entry.value} is not a {base.__name__} class")
    name = getattr(loaded, "name", None)
    if type(name) is not str or name != entry.name:
        raise ValueError(f"{entry.value} has the name {name!r}, not the entry point's")
    made = loaded()
    check(made)
    return made


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown distribution"


def _one_line(error: BaseException) -> str:
    return f"{shown(type(error).__name__, 80)}: {shown(error, 400)}"
