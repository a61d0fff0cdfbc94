"""Accounts of the computation that each party has received, for fair sharing."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

REMEMBERED = 1024
"""Maximum number of remembered accounts of parties that left above the level; older ones are forgotten."""


class Account:
    """Computation received by one party. `served`: tokens computed for it, plus credit added to level it with
    others."""

    def __init__(self, served: int) -> None:
        self.served = served


A = TypeVar("A", bound=Account)


class Ledger(Generic[A]):
    """Accounts with equal shares.

    A new account starts level with the lowest one, so waiting elsewhere gains nothing. A returning account resumes at
    its former value if that is higher, so leaving gains nothing. However many come and go, this level rises as fast as
    a fair share does, within some tokens: newcomers cannot shut out those who stay.
    """

    def __init__(self, make: Callable[[int], A]) -> None:
        self.accounts: dict[Hashable, A] = {}
        self._make = make
        self._left: OrderedDict[Hashable, int] = OrderedDict()
        self._fair = 0.0
        self._floor = 0

    def enter(self, name: Hashable) -> A:
        """The account of this name, opened if it does not exist."""
        if name not in self.accounts:
            least = min((each.served for each in self.accounts.values()), default=0)
            self.accounts[name] = self._make(max(least, self._floor, self._left.pop(name, 0)))
        return self.accounts[name]

    def leave(self, name: Hashable) -> None:
        """Close an account. The last one to leave is not remembered: it kept no other waiting."""
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
        """Settle a turn: keep all accounts within `most` tokens of those that could have used more.

        An account that wants less than its share would otherwise fall so far behind that it later shut the others out.
        One that used capacity that nobody else wanted would otherwise be shut out for it later.

        Args:
            hungry: accounts that could have used more in this turn.
            computed: tokens of this turn, of all accounts.
            most: maximum distance in tokens.
        """
        served = [each.served for each in hungry]
        highest = max(each.served for each in self.accounts.values())
        level = min(served, default=highest)
        for each in self.accounts.values():
            each.served = min(max(each.served, level - most), level + most)
        self._fair = min(self._fair + computed / len(self.accounts), highest + most)
        self._floor = int(self._fair) - most
