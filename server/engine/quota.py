"""Limits per group of owners: concurrent generations and tokens per minute."""

import math
from dataclasses import dataclass

from server.engine.request import Budget, KeyLimitError

MINUTE = 60.0
FORGET_FROM = 1024
"""Number of buckets from which full ones are removed; a full bucket is equivalent to a new one."""


@dataclass(frozen=True)
class Quota:
    """Limits of each group; None is unlimited.

    Attributes:
        rows: generations that run concurrently; more wait.
        queued: generations that wait.
        tokens: tokens of prompts and maximum texts per minute.
    """

    rows: int | None = None
    queued: int | None = None
    tokens: int | None = None


@dataclass
class _Bucket:
    level: float
    time: float


class Buckets:
    """Token buckets of groups, refilled at the quota's rate per minute up to one minute's amount.

    Full buckets are removed, so their number is limited to that of groups active within a minute.

    Args:
        tokens: tokens per minute of each group.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._buckets: dict[str, _Bucket] = {}
        self._forget_from = FORGET_FROM

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, group: str, tokens: int, now: float) -> None:
        """Take tokens. Raises KeyLimitError if there are not enough."""
        level = self._level(group, now) - tokens
        if level < 0:
            wait = math.inf if tokens > self._tokens else -level * MINUTE / self._tokens
            raise KeyLimitError(
                "tokens",
                f"this asks for {tokens} tokens, prompt and longest text, of which {int(level + tokens)} are left: the "
                f"limit is tokens_per_minute={self._tokens} (--key-limit)",
                wait,
                self.budget(group, now),
            )
        if len(self._buckets) >= self._forget_from:
            self._buckets = {
                name: each for name, each in self._buckets.items() if self._level(name, now) < self._tokens
            }
            self._forget_from = max(FORGET_FROM, 2 * len(self._buckets))
        self._buckets[group] = _Bucket(level, now)

    def budget(self, group: str, now: float) -> Budget:
        """Remaining tokens."""
        level = self._level(group, now)
        return Budget(self._tokens, int(level), (self._tokens - level) * MINUTE / self._tokens)

    def _level(self, group: str, now: float) -> float:
        bucket = self._buckets.get(group)
        if bucket is None:
            return self._tokens
        return min(self._tokens, bucket.level + (now - bucket.time) * self._tokens / MINUTE)
