"""Who is next where more wait than can be served, and who has to go where more come than can wait."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

from server.engine import Owner
from server.engine.ledger import Account, Ledger

FEW = 16
"""Owners who are remembered, beside as many as wait."""


@dataclass(order=True)
class Waiter:
    """One who waits or is served. Ordered as its group's turns are served.

    Attributes:
        end: what its owner will have had of the group's share by then, in bytes.
        called: is done when it is served, and raises what it is sent away with.
    """

    end: int
    number: int
    size: int = field(compare=False)
    owner: Owner = field(compare=False)
    called: "asyncio.Future[None]" = field(compare=False)
    served: bool = field(default=False, compare=False)


class WaiterGroup(Account):
    """Those of a group.

    Attributes:
        waiting: a heap.
        had: bytes that an owner could have had so far who always wanted more.
        ends: the last turn's end of owners who wait, or have had more than that.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.waiting: list[Waiter] = []
        self.inside = 0
        self.had = 0
        self.ends: dict[str, int] = {}


class FairLine:
    """Serves groups by turns, and within each its owners, by the bytes that they bring.

    Who brings little is served before those who bring much, whatever these have waiting. Where the line is full, the
    group that takes most of it gives way to one that takes less, and within a group the turn that would be served last.
    Belongs to the event loop's thread.

    Args:
        at_once: those who are served together.
        most: those who may be there altogether.
        full: makes what one is told who is sent away.
    """

    def __init__(self, at_once: int, most: int, full: Callable[[], Exception]) -> None:
        self._free = at_once
        self._most = most
        self._full = full
        self._groups: Ledger[WaiterGroup] = Ledger(WaiterGroup)
        self._number = count()
        self.inside = 0

    async def enter(self, owner: Owner, size: int) -> Waiter:
        """Wait to be served; to be left afterwards. Raises what `full` makes."""
        group = self._groups.enter(owner.group)
        end = max(group.had, group.ends.get(owner.name, 0)) + size
        turn = Waiter(end, next(self._number), size, owner, asyncio.get_running_loop().create_future())
        group.ends[owner.name] = end
        group.inside += 1
        self.inside += 1
        heappush(group.waiting, turn)
        if self.inside > self._most:
            self._send_away(group)
        self._call()
        try:
            await turn.called
        except BaseException:  # sent away, or the one who waits was ended
            if turn.served:
                self.leave(turn)
            elif turn in group.waiting:
                self._remove(turn)
            raise
        return turn

    def leave(self, turn: Waiter) -> None:
        """Make room for the next one, having been served."""
        self._free += 1
        self._gone(turn)
        self._call()

    def _call(self) -> None:
        while self._free:
            groups = [each for each in self._groups.accounts.values() if each.waiting]
            if not groups:
                return
            group = min(groups, key=lambda each: each.served + each.waiting[0].size)
            turn = heappop(group.waiting)
            group.served += turn.size
            group.had += -(-turn.size // max(1, len(group.ends)))
            if len(group.ends) > 2 * len(group.waiting) + FEW:  # who has had no more is as one who was never there
                group.ends = {name: end for name, end in group.ends.items() if end > group.had}
            self._free -= 1
            turn.served = True
            if not turn.called.done():
                turn.called.set_result(None)

    def _send_away(self, newest: WaiterGroup) -> None:
        groups = [each for each in self._groups.accounts.values() if each.waiting]
        largest = max(groups, key=lambda each: (each.inside, each is newest))
        turn = max(largest.waiting)
        self._remove(turn)
        turn.called.set_exception(self._full())

    def _remove(self, turn: Waiter) -> None:
        group = self._groups.accounts[turn.owner.group]
        group.waiting.remove(turn)
        heapify(group.waiting)
        if group.ends.get(turn.owner.name) == turn.end:
            group.ends[turn.owner.name] = turn.end - turn.size
        self._gone(turn)

    def _gone(self, turn: Waiter) -> None:
        group = self._groups.accounts[turn.owner.group]
        group.inside -= 1
        self.inside -= 1
        if not group.inside:
            self._groups.leave(turn.owner.group)
