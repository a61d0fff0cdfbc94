"""One forward, shared out."""

from collections.abc import Callable, Iterable, Sequence
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
        memories: canvases of those begun of which something is kept between forwards.
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
        fresh = self.waiting[: max(0, rows - sum(each.rows for each in self.begun))]
        if fresh:
            level = min((each.served for each in (*self.begun, *fresh) if each.served is not None), default=0)
            for each in fresh:
                each.served = level
        return sorted([*self.begun, *fresh], key=lambda each: each.served or 0)


class Group(Account):
    """Owners that share what one owner of another group gets.

    Attributes:
        rows: how many canvases of their generations a forward may have.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.owners = Ledger(Owned)
        self.rows = 0


@dataclass
class Turn:
    """What is left of a forward, and who is in it so far.

    Attributes:
        most: tokens that a forward can have.
        may_begin: whether a generation can have its first forward now.
        express: tokens that a forward is kept to in which something begins that is no more work than a forward.
    """

    most: int
    rows: int
    may_begin: Callable[[Generation, Owned], bool]
    express: int
    tokens: int = field(init=False)
    chosen: list[tuple[Generation, Owned]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.tokens = self.most

    def fits(self, generation: Generation) -> bool:
        """Whether there are tokens and rows enough left for it."""
        return generation.cost <= self.tokens and generation.rows <= self.rows

    def take(self, generation: Generation, owner: Owned, payers: Sequence[Account]) -> bool:
        """Let a generation take part at somebody's expense, if it may; it fits."""
        if generation.begun is None and not self.may_begin(generation, owner):
            return False
        cost = generation.cost
        generation.served = (generation.served or 0) + cost
        for account in payers:
            account.served += cost
        self.tokens -= cost
        self.express -= cost
        if generation.begun is None and generation.work <= self.most:
            self.tokens = min(self.tokens, max(0, self.express))
        self.rows -= generation.rows
        self.chosen.append((generation, owner))
        return True


class Hand(Protocol):
    """What somebody has to play in a turn."""

    @property
    def account(self) -> Account: ...

    @property
    def work(self) -> int:
        """Of what would be played next."""


H = TypeVar("H", bound=Hand)


class Line(Generic[H]):
    """Hands in the order of who has had least; of equals less work goes first, so that nobody waits long for little."""

    def __init__(self, hands: Iterable[H]) -> None:
        self._numbers = count()
        self._heap = [self._entry(hand) for hand in hands]
        heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def first(self) -> H:
        return self._heap[0][-1]

    def pop(self) -> H:
        return heappop(self._heap)[-1]

    def push(self, hand: H) -> None:
        heappush(self._heap, self._entry(hand))

    def _entry(self, hand: H) -> tuple[int, int, int, H]:
        return hand.account.served, hand.work, next(self._numbers), hand


class OwnerHand:
    """An owner's candidates of a turn, the first of them last; `hungry` if some got nothing."""

    def __init__(self, owner: Owned, rows: int) -> None:
        self.account = owner
        self.left = owner.candidates(rows)[::-1]
        self.hungry = False

    @property
    def work(self) -> int:
        return self.left[-1].work


class GroupHand:
    """The owners of a group in a turn, and the tokens that are computed at their expense."""

    def __init__(self, group: Group) -> None:
        self.account = group
        self.hands = [OwnerHand(owner, group.rows) for owner in group.owners.accounts.values()]
        self._line = Line(hand for hand in self.hands if hand.left)
        self._rows = group.rows
        self.computed = 0

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
        return self._rows > 0 and any(hand.hungry or hand.left for hand in self.hands)

    def play(self, turn: Turn) -> bool:
        """Let what comes first take part, at its owner's and the group's expense; False if it does not fit."""
        hand = self._line.pop()
        while hand.left:
            if not self._fits(turn, hand.left[-1]):
                self._line.push(hand)
                return False
            before, generation = self.account.served, hand.left.pop()
            if turn.take(generation, hand.account, (hand.account, self.account)):
                self.computed += self.account.served - before
                self._rows -= generation.rows
                break
        if hand.left:
            self._line.push(hand)
        return True

    def _fits(self, turn: Turn, generation: Generation) -> bool:
        return turn.fits(generation) and generation.rows <= self._rows

    def fill(self, turn: Turn) -> None:
        """Let whatever fits take part, at nobody's expense."""
        while self.left:
            hand = self._line.pop()
            for generation in hand.left[::-1]:
                if not turn.rows or not self._rows:
                    return
                if self._fits(turn, generation) and turn.take(generation, hand.account, ()):
                    self._rows -= generation.rows
                    hand.left.remove(generation)
            hand.hungry, hand.left = bool(hand.left), []


def share(ledger: Ledger[Group], turn: Turn) -> None:
    """Give what is left of a forward to these groups.

    Where what comes first of a group does not fit, the group waits until it is the first itself: nothing of it goes
    instead but into what all others leave, and that is given away. Else what is small would use up the share of what is
    large, which would never come first.
    """
    hands = [GroupHand(group) for group in ledger.accounts.values()]
    line = Line(hand for hand in hands if hand.left)
    aside: list[GroupHand] = []
    while turn.rows and len(line):
        hand = line.pop()
        if not hand.play(turn):
            aside.append(hand)
        elif hand.left:
            line.push(hand)
    for hand in aside:
        hand.fill(turn)
    for hand in hands:
        hungry = [each.account for each in hand.hands if each.hungry or each.left]
        hand.account.owners.level(hungry, hand.computed, turn.most)
    ledger.level([hand.account for hand in hands if hand.hungry], sum(hand.computed for hand in hands), turn.most)
