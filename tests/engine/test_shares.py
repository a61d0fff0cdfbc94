"""Owners share forwards: simulations of the scheduler, in which nothing is computed."""

from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import CacheMode
from server.engine.generation import Generation
from server.engine.ledger import REMEMBERED, Account, Ledger
from server.engine.quota import Quota
from server.engine.request import KeyLimitError, Owner, QueueFullError
from server.engine.scheduler import EXPRESS, Scheduler
from tests.engine.test_scheduler import generation, scheduler


def owned(owner: str, *lengths: int) -> list[Generation]:
    return [generation(length, owner=owner) for length in lengths]


def computed(turns: list[list[Generation]]) -> Counter[str]:
    """Tokens that forwards computed, by owner."""
    found: Counter[str] = Counter()
    for turn in turns:
        for each in turn:
            found[each.request.owner.name] += each.cost
    return found


def shut_out(made: Scheduler, turn: list[Generation]) -> list[Generation]:
    """What took no part in a forward although there was room for it."""
    left = made.limits.tokens - sum(each.cost for each in turn)
    if len(turn) == made.limits.rows:
        return []
    return [each for each in made.all() if each not in turn and each.begun is not None and each.cost <= left]


lengths = st.lists(st.sampled_from([1, 3, 10, 33, 100]), min_size=1, max_size=6)


@settings(deadline=None, max_examples=40)
@given(
    owners=st.lists(st.integers(1, 100), min_size=2, max_size=6), rows=st.integers(1, 8), tokens=st.integers(100, 300)
)
def test_whoever_wants_more_gets_as_many_tokens_as_any_other(owners: list[int], rows: int, tokens: int) -> None:
    """Each owner has more generations than there are rows, so that each could use all that there is."""
    many = [generation(n, owner=f"owner {i}") for i, n in enumerate(owners) for _ in range(rows + 1)]
    made = scheduler(*many, rows=rows, tokens=tokens)
    turns = []
    for _ in range(150):
        turns.append(made.pick())
        assert turns[-1] and len(turns[-1]) <= rows and sum(each.cost for each in turns[-1]) <= tokens
        assert not shut_out(made, turns[-1]), "a forward is as full as it can be"
    (ledger,) = made._ranks.values()
    accounts = [group.served for group in ledger.accounts.values()]
    assert max(accounts) - min(accounts) <= 2 * tokens
    # What nobody else could use is given away beyond the share.
    assert all(had >= least for had, least in zip(sorted(computed(turns).values()), sorted(accounts), strict=True))


@settings(deadline=None, max_examples=40)
@given(owners=st.lists(lengths, min_size=1, max_size=6), rows=st.integers(1, 6), tokens=st.integers(100, 300))
def test_everything_gets_its_turn(owners: list[list[int]], rows: int, tokens: int) -> None:
    """Whatever else there is: canvases that need a whole forward, and owners that have only small ones."""
    many = [generation(n, owner=f"owner {i}") for i, each in enumerate(owners) for n in each]
    made = scheduler(*many, rows=rows, tokens=tokens)
    missing = {id(each) for each in many}
    turns: Counter[int] = Counter()
    for _ in range(40 * tokens):
        for each in made.pick():
            missing.discard(id(each))
            turns[id(each)] += 1
            if turns[id(each)] == 12:
                made.remove(each)
        if made.empty:
            break
    assert not missing and made.empty


def test_a_large_one_is_not_held_up_by_its_owners_small_ones() -> None:
    large, small = owned("a", 100, 10)
    (other,) = owned("b", 9)  # has always had a little less, so that it always goes first
    made = scheduler(large, small, other, rows=4, tokens=100)
    turns = [made.pick() for _ in range(60)]
    assert sum(large in turn for turn in turns) >= 3


def test_a_newcomer_is_in_the_very_next_forward() -> None:
    """Four of the others' canvases fill it."""
    hogs = [each for i in range(20) for each in owned(f"hog {i}", *[2048] * 16)]
    made = scheduler(*hogs, rows=16, tokens=8192)
    for _ in range(50):
        made.pick()
    for i in range(5):
        (newcomer,) = owned(f"newcomer {i}", 1)
        made.add([newcomer])
        assert newcomer in made.pick()
        made.remove(newcomer)


def test_where_forwards_are_slow_a_short_one_begins_in_a_small_forward() -> None:
    made = scheduler(*owned("hog", *[100] * 16), rows=16, tokens=1600)
    assert len(made.pick(slow=True)) == 16, "nobody else is there"
    made.add(owned("newcomer", 1))
    turn = made.pick(slow=True)
    assert turn[-1].request.owner.name == "newcomer"
    assert sum(each.cost for each in turn) <= 1600 // EXPRESS
    assert len(made.pick(slow=True)) == 16, "only where it begins"
    made.add(owned("another", 1))
    assert len(made.pick()) == 16


def test_one_that_has_been_there_for_long_is_not_held_up_by_newcomers() -> None:
    """Ever more of them, each on a connection of its own, and each with less work."""
    (old,) = owned("old", 500)
    made = scheduler(old, rows=4, tokens=600)
    names = count()
    took = 0
    for _ in range(150):
        made.add(each for _ in range(4) for each in owned(f"new {next(names)}", 50))
        turn = made.pick()
        took += old in turn
        for each in turn:
            if each is not old:
                made.remove(each)
    assert took >= 5, "it is one of few, and gets what one of few gets"


def test_who_leaves_and_comes_back_gains_nothing() -> None:
    """One generation after the other, each a whole forward, against one that stays."""
    (stays,) = owned("stays", 10)
    made = scheduler(stays, rows=4, tokens=1000)
    turns = []
    made.add(owned("comes", 1000))
    for _ in range(500):
        turns.append(made.pick())
        for each in turns[-1]:
            if each is not stays:
                made.remove(each)
                made.add(owned("comes", 1000))
    had = computed(turns)
    assert had["comes"] - had["stays"] <= 2 * 1000


def test_what_was_not_wanted_cannot_be_saved_up() -> None:
    """Who wanted little for long does not shut the others out when it wants much."""
    made = scheduler(*owned("little", 1), *owned("much", *[100] * 8), rows=4, tokens=400)
    for _ in range(1000):
        made.pick()
    made.add(owned("little", *[100] * 8))
    turns = [made.pick() for _ in range(40)]
    assert computed(turns)["much"] >= 0.35 * sum(computed(turns).values())


def test_shares_are_of_tokens_not_of_turns() -> None:
    made = scheduler(*owned("long", *[100] * 4), *owned("short", *[10] * 20), rows=10, tokens=100)
    had = computed([made.pick() for _ in range(200)])
    assert abs(had["long"] - had["short"]) <= 200 < 5000 < had["long"]


def test_what_nobody_else_could_use_costs_nothing_later() -> None:
    """Beside a canvas of 51 of 100 no other of 51 fits, but several of 14 do."""
    large = [*owned("a", *[51] * 4), *owned("b", *[51] * 4)]
    made = scheduler(*large, *owned("c", *[14] * 4), rows=3, tokens=100)
    for _ in range(1000):
        made.pick()
    made.add([*owned("a", *[14] * 4), *owned("b", *[14] * 4)])
    for each in large:
        made.remove(each)
    assert computed([made.pick() for _ in range(60)])["c"] >= 0.25 * 60 * 42


def test_groups_share_before_owners_do() -> None:
    """Connections from one address get together what one from another gets."""
    crowd = [generation(100, owner=Owner(f"connection {i}", "crowd")) for i in range(12)]
    single = [generation(20, owner=Owner("connection", "single")) for _ in range(12)]
    made = scheduler(*crowd, *single, rows=4, tokens=100)
    turns = [made.pick() for _ in range(240)]
    together = sum(each.cost for turn in turns for each in turn if each in crowd)
    assert abs(together - computed(turns)["connection"]) <= 200 < 8000 < together
    connections = [sum(each in turn for turn in turns) for each in crowd]
    assert max(connections) - min(connections) <= 2


def test_priority_is_among_ones_own() -> None:
    urgent = [generation(10, priority=-(2**63), owner="urgent") for _ in range(40)]
    others = [generation(10, priority=9, owner="patient") for _ in range(3)]
    made = scheduler(*urgent, *others, rows=4, tokens=40)
    turns = [made.pick() for _ in range(20)]
    assert sum(each in others for turn in turns for each in turn) == 40


def test_the_admins_priority_is_across_owners() -> None:
    def admin(priority: int) -> Generation:
        return generation(10, priority, owner=Owner("admin", "admin", ahead=True))

    others = owned("other", *[10] * 4)
    first, last, equal = admin(-1), admin(1), admin(0)
    made = scheduler(*others, last, rows=1, tokens=10)
    for _ in range(10):
        assert last not in made.pick()
    made.add([first])
    for _ in range(10):
        assert made.pick() == [first]
    made.remove(first)
    made.add([equal])
    assert sum(equal in made.pick() for _ in range(20)) in (9, 10, 11)


def test_two_that_fill_the_queue_do_not_keep_a_third_out() -> None:
    made = scheduler(*owned("first", *[8] * 256), rows=16, queue=256)
    made.pick()
    made.check(Owner("first", "first"), 16)
    made.add(owned("first", *[8] * 16))
    with pytest.raises(QueueFullError, match="256 generations are waiting, the limit is 256"):
        made.check(Owner("first", "first"), 1)
    with pytest.raises(QueueFullError):
        made.check(Owner("second", "second"), 256)
    made.check(Owner("second", "second"), 128)
    made.add(owned("second", *[8] * 128))
    with pytest.raises(QueueFullError):
        made.check(Owner("second", "second"), 1)
    for i in range(3, 8):
        made.check(Owner(str(i), str(i)), 1)
        made.add(owned(str(i), 8))


def test_no_more_wait_than_twice_the_limit_whoever_comes() -> None:
    made = scheduler(*owned("first", *[8] * 64), rows=1, queue=64)
    for i in range(200):
        owner = Owner(str(i), str(i))
        for more in (64, 32, 16, 8, 4, 2, 1):
            try:
                made.check(owner, more)
            except QueueFullError:
                continue
            made.add(owned(str(i), *[8] * more))
    assert 64 < made.waits <= 128


def test_where_all_have_their_share_a_full_queue_is_full() -> None:
    made = scheduler(*(each for i in range(8) for each in owned(str(i), 8)), rows=2, queue=8)
    with pytest.raises(QueueFullError):
        made.check(Owner("9", "9"), 1)


def test_a_quota_bounds_what_runs_and_what_waits() -> None:
    quota = Quota(rows=2, queued=3)
    made = scheduler(*owned("key", *[8] * 4), rows=4, quota=quota)
    assert len(made.pick()) == 2
    made.check(Owner("key", "key"), 1)
    with pytest.raises(KeyLimitError, match="queued=3") as refused:
        made.check(Owner("key", "key"), 2)
    assert (refused.value.limit, refused.value.wait) == ("queued", 1.0)
    with pytest.raises(KeyLimitError, match="rows=2") as refused:
        made.check(Owner("other", "other"), 6)
    assert (refused.value.limit, refused.value.wait) == ("rows", float("inf"))
    made.check(Owner("admin", "admin", ahead=True), 6)
    made.add(generation(8, owner=Owner("admin", "admin", ahead=True)) for _ in range(6))
    assert sum(each.request.owner.ahead for turn in (made.pick(), made.pick()) for each in turn) >= 4


def test_a_groups_rows_are_those_of_all_its_owners() -> None:
    many = [generation(8, owner=Owner(f"connection {i}", "address")) for i in range(6)]
    made = scheduler(*many, rows=4, quota=Quota(rows=2))
    assert len(made.pick()) == 2


def test_what_is_kept_between_forwards_is_bounded_and_nobody_shut_out() -> None:
    """What is set aside keeps its keys and values."""
    hogs = [generation(64, cache=CacheMode.DUAL, owner=f"hog {i}") for i in range(3) for _ in range(20)]
    made = scheduler(*hogs, rows=8, tokens=8192)
    for _ in range(30):
        made.pick()
    assert sum(each.begun is not None for each in made.all()) <= 8 + 1
    late = generation(64, cache=CacheMode.DUAL, owner="late")
    made.add([late])
    assert late in made.pick()
    (uncached,) = owned("uncached", 64)
    made.add([uncached])
    assert uncached in made.pick()
    for each in made.all():
        made.remove(each)
    assert made._memories == 0


def test_accounts_are_closed_and_debts_bounded() -> None:
    ledger = Ledger(Account)
    ledger.enter("stays")
    for i in range(3 * REMEMBERED):
        ledger.enter(i).served += 10
        ledger.leave(i)
    assert set(ledger.accounts) == {"stays"} and len(ledger._left) == REMEMBERED
    assert ledger.enter(3 * REMEMBERED - 1).served == 10
    ledger.leave(3 * REMEMBERED - 1)
    ledger.leave("stays")
    assert not ledger._left
    made = scheduler(*owned("a", 8), *owned("b", 8))
    for each in made.all():
        made.remove(each)
    assert made.empty and not made._ranks
