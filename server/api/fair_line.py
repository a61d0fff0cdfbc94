"""Fair queueing: the order in which waiting requests are served, and which to refuse when the queue is full."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

from server.engine import Owner
from server.engine.ledger import Account, Ledger

MIN_REMEMBERED = 16
"""Owners remembered in addition to those that wait."""


@dataclass(order=True)
class Waiter:
    """A queued or served request, ordered by its turn within its group.

    Attributes:
        end: bytes of its owner's virtual service at the end of this request, as in weighted fair queueing.
        admission: future that completes when the request is served, or raises if it is refused.
    """

    end: int
    number: int
    size: int = field(compare=False)
    owner: Owner = field(compare=False)
    admission: "asyncio.Future[None]" = field(compare=False)
    served: bool = field(default=False, compare=False)


class WaiterGroup(Account):
    """Queued requests of one group.

    Attributes:
        waiting: heap of queued requests.
        virtual_time: virtual time of the group: bytes served to an owner that always virtual_time requests waiting.
        ends: for each owner that waits or is ahead of `virtual_time`, the `end` of its last request.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.waiting: list[Waiter] = []
        self.inside = 0
        self.virtual_time = 0
        self.ends: dict[str, int] = {}


class FairLine:
    """Fair queue over groups, and over the owners within each group, by request size in bytes.

    An owner with few bytes is served before one with many, however much the latter has waiting. When the queue is full,
    the group with the most requests loses the one that would be served last. Use from the event loop's thread only.

    Args:
        concurrency: number of requests served concurrently.
        capacity: maximum number of requests, queued and being served.
        full: makes the exception for a refused request.
    """

    def __init__(self, concurrency: int, capacity: int, full: Callable[[], Exception]) -> None:
        self._free = concurrency
        self._capacity = capacity
        self._full = full
        self._groups: Ledger[WaiterGroup] = Ledger(WaiterGroup)
        self._number = count()
        self.inside = 0

    async def enter(self, owner: Owner, size: int) -> Waiter:
        """Wait for service. Call `leave` afterwards. Raises the exception made by `full`."""
        group = self._groups.enter(owner.group)
        end = max(group.virtual_time, group.ends.get(owner.name, 0)) + size
        turn = Waiter(end, next(self._number), size, owner, asyncio.get_running_loop().create_future())
        group.ends[owner.name] = end
        group.inside += 1
        self.inside += 1
        heappush(group.waiting, turn)
        if self.inside > self._capacity:
            self._refuse_last(group)
        self._serve_next()
        try:
            await turn.admission
        except BaseException:  # refused, or the waiting task was cancelled
            if turn.served:
                self.leave(turn)
            elif turn in group.waiting:
                self._remove(turn)
            raise
        return turn

    def leave(self, turn: Waiter) -> None:
        """Release a served request's place for the next one."""
        self._free += 1
        self._leave_group(turn)
        self._serve_next()

    def _serve_next(self) -> None:
        while self._free:
            groups = [each for each in self._groups.accounts.values() if each.waiting]
            if not groups:
                return
            group = min(groups, key=lambda each: each.served + each.waiting[0].size)
            turn = heappop(group.waiting)
            group.served += turn.size
            group.virtual_time += -(-turn.size // max(1, len(group.ends)))
            if len(group.ends) > 2 * len(group.waiting) + MIN_REMEMBERED:  # an owner that is not ahead needs no entry
                group.ends = {name: end for name, end in group.ends.items() if end > group.virtual_time}
            self._free -= 1
            turn.served = True
            if not turn.admission.done():
                turn.admission.set_result(None)

    def _refuse_last(self, newest: WaiterGroup) -> None:
        groups = [each for each in self._groups.accounts.values() if each.waiting]
        largest = max(groups, key=lambda each: (each.inside, each is newest))
        turn = max(largest.waiting)
        self._remove(turn)
        turn.admission.set_exception(self._full())

    def _remove(self, turn: Waiter) -> None:
        group = self._groups.accounts[turn.owner.group]
        group.waiting.remove(turn)
        heapify(group.waiting)
        if group.ends.get(turn.owner.name) == turn.end:
            group.ends[turn.owner.name] = turn.end - turn.size
        self._leave_group(turn)

    def _leave_group(self, turn: Waiter) -> None:
        group = self._groups.accounts[turn.owner.group]
        group.inside -= 1
        self.inside -= 1
        if not group.inside:
            self._groups.leave(turn.owner.group)
