"""Who shares what forwards compute, and how much each has had."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

REMEMBERED = 1024
"""Accounts of those who left having had more than others; beyond that the oldest are forgotten."""


class Account:
    """What somebody has had. `served`: tokens that forwards computed, and what it was given to be level with others."""

    def __init__(self, served: int) -> None:
        self.served = served


A = TypeVar("A", bound=Account)


class Ledger(Generic[A]):
    """Accounts that share with equal rights.

    Who comes is level with who has had least, so that nobody gains by having waited elsewhere, and who comes back is
    where it was, if that is more, so that nobody gains by leaving. However many come and go, this level rises as fast
    as a fair share does, but for some tokens: those who stay are passed by no endless row of newcomers.
    """

    def __init__(self, make: Callable[[int], A]) -> None:
        self.accounts: dict[Hashable, A] = {}
        self._make = make
        self._left: OrderedDict[Hashable, int] = OrderedDict()
        self._fair = 0.0
        self._floor = 0

    def enter(self, name: Hashable) -> A:
        """The account of this name, opened if it is not there."""
        if name not in self.accounts:
            least = min((each.served for each in self.accounts.values()), default=0)
            self.accounts[name] = self._make(max(least, self._floor, self._left.pop(name, 0)))
        return self.accounts[name]

    def leave(self, name: Hashable) -> None:
        """Close an account. The last one who leaves owes nothing: nobody was kept waiting."""
        account = self.accounts.pop(name)
        if not self.accounts:
            self._left.clear()
            self._fair, self._floor = 0.0, 0
            return
        if account.served > min(each.served for each in self.accounts.values()):
            self._left[name] = account.served
            if len(self._left) > REMEMBERED:
                self._left.popitem(last=False)

    def level(self, hungry: Iterable[A], computed: int, most: int) -> None:
        """Settle a turn: accounts stay within `most` tokens of those who could have used more.

        Who wants less than its share gets all that it wants, and would otherwise come to have had so little that later
        it shut the others out. Who got what nobody else could use would otherwise be shut out for that later.

        Args:
            hungry: those who could have used more in this turn.
            computed: tokens of this turn, of all.
        """
        served = [each.served for each in hungry]
        highest = max(each.served for each in self.accounts.values())
        level = min(served, default=highest)
        for each in self.accounts.values():
            each.served = min(max(each.served, level - most), level + most)
        self._fair = min(self._fair + computed / len(self.accounts), highest + most)
        self._floor = int(self._fair) - most
