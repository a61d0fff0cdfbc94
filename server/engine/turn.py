"""Sharing of one forward."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, Protocol, TypeVar

from server.engine.generation import Generation
from server.engine.ledger import Account, Ledger


class Owned(Account):
    """Generations of one owner.

    Attributes:
        begun: generations that have taken part in a forward.
        waiting: the others, by priority and arrival.
        memories: number of canvases of `begun` that keep keys and values between forwards.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.begun: list[Generation] = []
        self.waiting: list[Generation] = []
        self.memories = 0

    def candidates(self, rows: int) -> list[Generation]:
        """Candidates for the next forward, in order, if at most `rows` may have begun.

        Those with fewer tokens computed go first. A waiting generation begins level with the one that has had least.
        """
        fresh = self.waiting[: max(0, rows - sum(each.rows for each in self.begun))]
        if fresh:
            level = min((each.served for each in (*self.begun, *fresh) if each.served is not None), default=0)
            for each in fresh:
                each.served = level
        return sorted([*self.begun, *fresh], key=lambda each: each.served or 0)


class Group(Account):
    """Owners that together get one group's share.

    Attributes:
        rows: maximum number of canvases of their generations in a forward.
    """

    def __init__(self, served: int) -> None:
        super().__init__(served)
        self.owners = Ledger(Owned)
        self.rows = 0


@dataclass
class Turn:
    """Remaining capacity of a forward, and the generations chosen so far.

    Attributes:
        most: maximum tokens of a forward.
        may_begin: returns True if a generation can have its first forward now.
        express: token limit of a forward in which a generation begins whose whole work fits into one forward.
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
        """True if there are enough tokens and rows left for the generation."""
        return generation.cost <= self.tokens and generation.rows <= self.rows

    def take(self, generation: Generation, owner: Owned, payers: Sequence[Account]) -> bool:
        """Add a generation that fits, if it may begin, and charge these accounts. False if it may not."""
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
    """Candidates of one party in a turn."""

    @property
    def account(self) -> Account: ...

    @property
    def work(self) -> int:
        """Work of the next candidate, in tokens."""


H = TypeVar("H", bound=Hand)


class Line(Generic[H]):
    """Hands ordered by tokens received, least first; ties go to less work, so that short requests do not wait long."""

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
    """An owner's candidates in a turn, in reverse order; `hungry` is True if some were left out."""

    def __init__(self, owner: Owned, rows: int) -> None:
        self.account = owner
        self.left = owner.candidates(rows)[::-1]
        self.hungry = False

    @property
    def work(self) -> int:
        return self.left[-1].work


class GroupHand:
    """Owners of a group in a turn, and the tokens charged to them."""

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
        """True if the group can add more."""
        return self._rows > 0 and len(self._line) > 0

    @property
    def hungry(self) -> bool:
        """True if the group could have used more than it got."""
        return self._rows > 0 and any(hand.hungry or hand.left for hand in self.hands)

    def play(self, turn: Turn) -> bool:
        """Add the next candidate and charge its owner and the group. False if it does not fit."""
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
        """Add all candidates that fit, without charge."""
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
    """Distribute the rest of a forward among these groups.

    If the next candidate of a group does not fit, the group waits until its turn comes first; its smaller candidates
    only get what all other groups leave, without charge. Otherwise small generations would use up the share of a large
    one, which would never run.
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
