"""Selection of the generations in the next forward, and admission to the queue."""

import math
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from server.engine.generation import Generation
from server.engine.ledger import Ledger
from server.engine.quota import Quota
from server.engine.request import KeyLimitError, Owner, QueueFullError
from server.engine.turn import Group, Owned, Turn, share

EXPRESS = 4
"""Divisor of a forward's tokens when forwards are slow, owners compete and a short generation begins."""


@dataclass(frozen=True)
class Limits:
    """Limits of forwards and of the queue.

    Attributes:
        rows: canvases per forward: generations, unless they have several.
        queue: number of waiting generations.
        tokens: tokens per forward, over all rows.
        work: maximum tokens that forwards may compute for one request, estimated before the first; None: unlimited.
        quota: limits of each group of owners.
    """

    rows: int = 16
    queue: int = 256
    tokens: int = 8192
    work: int | None = None
    quota: Quota = field(default_factory=Quota)

    @property
    def memories(self) -> int:
        """Canvases that may keep keys and values between forwards; those beyond `rows` are for owners that have
        none."""
        return self.rows + max(1, self.rows // 8)


@dataclass
class Scheduler:
    """Shares forwards by the number of tokens computed. Admits by priority, then by arrival.

    A forward has at most `limits.rows` canvases and computes at most `limits.tokens` tokens. Owners with the fewest
    tokens computed so far go first, so all that want more than they get receive equally many tokens per second,
    whatever their requests. The same holds among groups, among the owners of a group, and among an owner's generations.
    The rest of a forward goes to any generation that fits. A generation that takes no part in a forward stays as it is.
    Rank takes precedence over all shares; only the priorities of some owners affect it (see `Owner.ahead`).

    The caller ensures that no generation exceeds a forward in number or length of canvases, and that only one thread at
    a time uses the scheduler.

    Attributes:
        running: generations of the last forward, and earlier ones that keep their rows while some are free.
    """

    limits: Limits = field(default_factory=Limits)
    running: list[Generation] = field(default_factory=list)
    _ranks: dict[int, Ledger[Group]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)
    _inside: int = 0
    _memories: int = 0
    _held: bool = False

    @property
    def waiting(self) -> list[Generation]:
        """Generations without a row: not yet begun, or set aside."""
        running = {id(each) for each in self.running}
        return [each for each in self.all() if id(each) not in running]

    @property
    def waits(self) -> int:
        """Number of generations without a row."""
        return self._inside - len(self.running)

    @property
    def empty(self) -> bool:
        """True if there are no generations."""
        return not self._inside

    def all(self) -> list[Generation]:
        """All generations, by owner."""
        owned = [
            owner
            for ledger in self._ranks.values()
            for group in ledger.accounts.values()
            for owner in group.owners.accounts.values()
        ]
        return [each for owner in owned for each in (*owner.begun, *owner.waiting)]

    def check(self, owner: Owner, more: int) -> None:
        """Raise QueueFullError or KeyLimitError unless `more` generations of this owner may wait."""
        mine = [group for ledger in self._ranks.values() if (group := ledger.accounts.get(owner.group))]
        if not owner.ahead:
            self._check_quota(owner, mine, more)
        if self.waits + more <= self.limits.queue:
            return
        # The queue is full, but not with what is this owner's: as many places again are for such, and half of those
        # that are left for each of them, so that whoever comes later finds some too.
        groups = {name for ledger in self._ranks.values() for name in ledger.accounts}
        owners = {name for group in mine for name in group.owners.accounts}
        share = self.limits.queue // len(groups | {owner.group}) // len(owners | {owner.name})
        held = sum(each.request.owner == owner for each in self.waiting)
        left = 2 * self.limits.queue - self.waits
        if held + more > share or more > math.ceil(left / 2):
            raise QueueFullError(f"{self.waits} generations are waiting, the limit is {self.limits.queue}")

    def _check_quota(self, owner: Owner, mine: list[Group], more: int) -> None:
        """Raise KeyLimitError if a group may neither run nor queue the generations."""
        quota = self.limits.quota
        if quota.queued is None:
            return
        rows = self.rows_of(owner)
        there = sum(len(each.begun) + len(each.waiting) for group in mine for each in group.owners.accounts.values())
        if there + more <= rows + quota.queued:
            return
        limit, value = ("rows", rows) if quota.queued == 0 or more > rows + quota.queued else ("queued", quota.queued)
        raise KeyLimitError(
            limit,
            f"{there} generations of yours are here and {more} more were asked for, but {rows} may run at once and "
            f"{quota.queued} wait: the limit is {limit}={value} (--key-limit)",
            math.inf if more > rows + quota.queued else 1.0,
        )

    def rows_of(self, owner: Owner) -> int:
        """How many generations of an owner's group a forward may have."""
        limited = None if owner.ahead else self.limits.quota.rows
        return self.limits.rows if limited is None else min(limited, self.limits.rows)

    def add(self, generations: Iterable[Generation]) -> None:
        """Queue generations, in this order among equal priorities of an owner."""
        for generation in generations:
            owner = generation.request.owner
            ledger = self._ranks.setdefault(_rank(generation), Ledger(Group))
            group = ledger.enter(owner.group)
            group.rows = self.rows_of(owner)
            insort(group.owners.enter(owner.name).waiting, generation, key=lambda each: each.request.priority)
            self._inside += 1

    def pick(self, slow: bool = False) -> list[Generation]:
        """Generations of the next forward, in the order in which they began; empty only if there are none.

        Args:
            slow: True if a full forward takes long enough to delay short requests noticeably.
        """
        express = self.limits.tokens // EXPRESS if slow and self._owners() > 1 else self.limits.tokens
        turn = Turn(self.limits.tokens, self.limits.rows, self._may_begin, express)
        self._held = False
        for rank in sorted(self._ranks):
            share(self._ranks[rank], turn)
        for generation, owner in turn.chosen:
            if generation.begun is None:
                generation.begun = next(self._numbers)
                owner.waiting.remove(generation)
                owner.begun.append(generation)
        chosen = sorted((generation for generation, _ in turn.chosen), key=lambda each: each.begun or 0)
        was, taken = self.running, {id(each) for each in chosen}
        self.running = [*chosen]
        for each in [each for each in was if id(each) not in taken]:
            if each.rows <= turn.rows:
                turn.rows -= each.rows
                self.running.append(each)
        return chosen

    def _owners(self) -> int:
        """Number of owners with generations."""
        return sum(len(g.owners.accounts) for ledger in self._ranks.values() for g in ledger.accounts.values())

    def _may_begin(self, generation: Generation, owner: Owned) -> bool:
        """Reserve room for the keys and values that a generation keeps between forwards. False if there is none.

        If a generation that needs room for several canvases does not fit, later ones get none in this turn. Otherwise
        single canvases would take all free room forever.
        """
        more = generation.memories
        if not more:
            return True
        if self._held:
            return False
        if self._memories + more > (self.limits.memories if owner.memories == 0 else self.limits.rows):
            self._held = more > 1
            return False
        owner.memories += more
        self._memories += more
        return True

    def remove(self, generation: Generation) -> None:
        """Remove a generation, waiting or running."""
        name = generation.request.owner
        ledger = self._ranks[_rank(generation)]
        group = ledger.accounts[name.group]
        owner = group.owners.accounts[name.name]
        if generation.begun is None:
            owner.waiting.remove(generation)
        else:
            owner.begun.remove(generation)
            owner.memories -= generation.memories
            self._memories -= generation.memories
        self._inside -= 1
        if generation in self.running:
            self.running.remove(generation)
        if not (owner.begun or owner.waiting):
            group.owners.leave(name.name)
        if not group.owners.accounts:
            ledger.leave(name.group)
        if not ledger.accounts:
            del self._ranks[_rank(generation)]

    def clear(self) -> list[Generation]:
        """Remove and return all generations."""
        left = self.all()
        for generation in left:
            self.remove(generation)
        return left


def _rank(generation: Generation) -> int:
    """Rank of a generation; takes precedence over all shares."""
    return generation.request.priority if generation.request.owner.ahead else 0
