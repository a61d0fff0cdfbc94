"""One forward, shared out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

from server.engine.generation import Generation
from server.engine.ledger import Account, Ledger


class Owned(Account):
    """One owner's generations.

    Attributes:
        begun: those that took part in a forward.
        waiting: the others, by priority and arrival.
        memories: how many of those begun keep something between forwards.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.begun: list[Generation] = []
        self.waiting: list[Generation] = []
        self.memories = 0

    def candidates(self, rows: int) -> list[Generation]:
        """What may take part in the next forward where no more than `rows` may have begun, in order.

        Those go first for which fewer tokens were computed. What waits begins level with what has had least.
        """
        fresh = self.waiting[: max(0, rows - len(self.begun))]
        if fresh:
            level = min((each.served for each in (*self.begun, *fresh) if each.served is not None), default=0)
            for each in fresh:
                each.served = level
        return sorted([*self.begun, *fresh], key=lambda each: each.served or 0)


class Group(Account):
    """Owners that share what one owner of another group gets.

    Attributes:
        rows: how many of their generations a forward may have.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.owners = Ledger(Owned)
        self.rows = 0


@dataclass
class Turn:
    """What is left of a forward, and who is in it so far.

    Attributes:
        number: counts turns.
        may_begin: whether a generation can have its first forward now.
    """

    number: int
    tokens: int
    rows: int
    may_begin: Callable[[Generation, Owned], bool]
    chosen: list[tuple[Generation, Owned]] = field(default_factory=list)

    def take(self, generation: Generation, owner: Owned, group: Group) -> None:
        """Let a generation take part, at its owner's expense."""
        cost = generation.cost
        generation.served = (generation.served or 0) + cost
        for account in (owner, group):
            account.served += cost
            account.turn = self.number
        self.tokens -= cost
        self.rows -= 1
        self.chosen.append((generation, owner))


class Hand(Protocol):
    """What somebody has to play in a turn."""

    @property
    def account(self) -> Account: ...

    @property
    def work(self) -> int:
        """Of what would be played next."""


H = TypeVar("H", bound=Hand)


class Line(Generic[H]):
    """Hands in the order of who has had least.

    Of equals less work goes first, but first of all the one that took part longest ago: what is short is not held up by
    what is long, nor what is long by ever more that is short.
    """

    def __init__(self, hands: Sequence[H]) -> None:
        self._numbers = count()
        oldest = min(hands, key=lambda hand: (hand.account.served, hand.account.turn), default=None)
        self._heap = [
            (hand.account.served, -1 if hand is oldest else hand.work, next(self._numbers), hand) for hand in hands
        ]
        heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> H:
        return self._heap[0][-1]

    def pop(self) -> H:
        return heappop(self._heap)[-1]

    def push(self, hand: H) -> None:
        heappush(self._heap, (hand.account.served, hand.work, next(self._numbers), hand))


class OwnerHand:
    """An owner's candidates of a turn, in order; `hungry` once one of them did not fit."""

    def __init__(self, owner: Owned, rows: int) -> None:
        self.account = owner
        self.left = owner.candidates(rows)[::-1]
        self._unfit = False

    @property
    def work(self) -> int:
        return self.left[-1].work

    @property
    def hungry(self) -> bool:
        return self._unfit or bool(self.left)

    def play(self, turn: Turn, group: Group) -> bool:
        """Let the first take part that can; False if none can."""
        while self.left:
            generation = self.left.pop()
            if generation.cost > turn.tokens:
                self._unfit = True
            elif generation.begun is not None or turn.may_begin(generation, self.account):
                turn.take(generation, self.account, group)
                return True
        return False


class GroupHand:
    """The owners of a group in a turn."""

    def __init__(self, group: Group) -> None:
        self.account = group
        self._rows = group.rows
        self._hands = [OwnerHand(owner, group.rows) for owner in group.owners.accounts.values()]
        self._line = Line([hand for hand in self._hands if hand.left])

    @property
    def work(self) -> int:
        return self._line.first.work

    @property
    def left(self) -> bool:
        """Whether it may play on."""
        return self._rows > 0 and len(self._line) > 0

    @property
    def hungry(self) -> bool:
        """Whether it could have used more than it got."""
        return self._rows > 0 and any(hand.hungry for hand in self._hands)

    def play(self, turn: Turn) -> None:
        """Let one of its generations take part, if one can."""
        while len(self._line):
            hand = self._line.pop()
            if hand.play(turn, self.account):
                self._rows -= 1
                if hand.left:
                    self._line.push(hand)
                return

    def settle(self, most: int) -> None:
        """Level its owners, see `Ledger.level`."""
        self.account.owners.level([hand.account for hand in self._hands if hand.hungry], most)


def share(ledger: Ledger[Group], turn: Turn, most: int) -> None:
    """Give what is left of a forward to these groups. `most`: tokens that a forward can have."""
    hands = [GroupHand(group) for group in ledger.accounts.values()]
    line = Line([hand for hand in hands if hand.left])
    while turn.rows and len(line):
        hand = line.pop()
        hand.play(turn)
        if hand.left:
            line.push(hand)
    for hand in hands:
        hand.settle(most)
    ledger.level([hand.account for hand in hands if hand.hungry], most)
