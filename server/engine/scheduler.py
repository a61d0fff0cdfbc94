"""Who takes part in the next forward, and who may wait for one."""

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
"""Where forwards are slow and owners compete, one in which something short begins has this part of its tokens."""


@dataclass(frozen=True)
class Limits:
    """Attributes:
    rows: canvases of one forward: generations, unless they have several.
    queue: generations that wait.
    tokens: tokens of one forward, over all its rows.
    work: tokens that forwards may have to compute for one request, by what is known before the first; None: any.
    quota: what each group of owners may have.
    """

    rows: int = 16
    queue: int = 256
    tokens: int = 8192
    work: int | None = None
    quota: Quota = field(default_factory=Quota)

    @property
    def memories(self) -> int:
        """Canvases of which something is kept between forwards; those beyond `rows` are for owners that have none."""
        return self.rows + max(1, self.rows // 8)


@dataclass
class Scheduler:
    """Shares out forwards by the tokens that they compute; admits by priority, then by arrival.

    A forward has at most `limits.rows` canvases and computes at most `limits.tokens`. Those owners go first for whom
    the fewest tokens were computed so far, so that all that want more than they get get equally many tokens a second,
    whatever they sent; the same holds among groups, among the owners of a group, and among an owner's generations. What
    is left of a forward goes to whoever fits. A generation that takes no part in a forward stays as it is. Ahead of all
    of this stands the rank, which only some owners' priority is.

    The caller sees to it that no generation's canvases are more, or longer, than a forward takes, and that one thread
    at a time is in here.

    Attributes:
        running: what took part in the last forward, and what had a row before where rows are left.
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
        """What has no row: what has not begun, and what was set aside."""
        running = {id(each) for each in self.running}
        return [each for each in self.all() if id(each) not in running]

    @property
    def waits(self) -> int:
        """How many have no row."""
        return self._inside - len(self.running)

    @property
    def empty(self) -> bool:
        """Whether nothing is here."""
        return not self._inside

    def all(self) -> list[Generation]:
        """Everything that is here, by owner."""
        owned = [
            owner
            for ledger in self._ranks.values()
            for group in ledger.accounts.values()
            for owner in group.owners.accounts.values()
        ]
        return [each for owner in owned for each in (*owner.begun, *owner.waiting)]

    def check(self, owner: Owner, more: int) -> None:
        """Raise QueueFullError or KeyLimitError unless so many more of this owner's may wait."""
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
        """Refuse what a group may neither run nor let wait."""
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
        """Queue them; among equal priorities of an owner in this order."""
        for generation in generations:
            owner = generation.request.owner
            ledger = self._ranks.setdefault(_rank(generation), Ledger(Group))
            group = ledger.enter(owner.group)
            group.rows = self.rows_of(owner)
            insort(group.owners.enter(owner.name).waiting, generation, key=lambda each: each.request.priority)
            self._inside += 1

    def pick(self, slow: bool = False) -> list[Generation]:
        """Those that take part in the next forward, in the order in which they began; none only if there are none.

        Args:
            slow: whether a full forward takes so long that whoever has little to ask would feel it.
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
        """How many owners are here."""
        return sum(len(g.owners.accounts) for ledger in self._ranks.values() for g in ledger.accounts.values())

    def _may_begin(self, generation: Generation, owner: Owned) -> bool:
        """Whether there is room for what it keeps between forwards; takes it.

        Where one needs room for several canvases, none of those after it gets any in this turn, or single ones would
        take whatever becomes free for ever.
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
        """Take it out, wherever it is."""
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
        """Take all out."""
        left = self.all()
        for generation in left:
            self.remove(generation)
        return left


def _rank(generation: Generation) -> int:
    """What stands above all shares."""
    return generation.request.priority if generation.request.owner.ahead else 0
