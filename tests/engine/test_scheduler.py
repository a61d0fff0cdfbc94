"""Who runs next: an owner's by priority and arrival; forwards shared out by tokens, so that nobody starves."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from samplers import CacheMode, Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import run
from samplers.loop.work import work
from server.engine.generation import Generation
from server.engine.quota import Quota
from server.engine.request import GenerationRequest, Owner
from server.engine.scheduler import Limits, Scheduler
from tests.samplers.models import MASK, predictor

TOPK = get_sampler("topk")


def generation(
    length: int, priority: int = 0, cache: CacheMode = CacheMode.NONE, owner: Owner | str = "", steps: int | None = None
) -> Generation:
    if isinstance(owner, str):
        owner = Owner(owner, owner)
    params = TOPK.Params(steps=steps)
    request = GenerationRequest([], length, TOPK, params, priority=priority, owner=owner)
    row = Row(Canvas.blank([], length, MASK, 8), TOPK, params, cache=cache)
    return Generation(request, lambda event: None, row, work(row))


def scheduler(*generations: Generation, quota: Quota | None = None, **limits: int) -> Scheduler:
    made = Scheduler(Limits(**limits, quota=quota or Quota()))
    made.add(generations)
    return made


def tokens(turns: list[list[Generation]], each: Generation) -> int:
    """What forwards computed for one."""
    return sum(each in turn for turn in turns) * each.cost


def test_first_come_first_served_among_equals() -> None:
    waiting = [generation(8, priority) for priority in (0, 1, 0, -3, 1)]
    made = scheduler(*waiting, rows=4)
    assert made.pick() == [waiting[i] for i in (3, 0, 2, 1)]
    assert made.waiting == [waiting[4]]
    made.remove(waiting[0])
    assert made.pick() == [waiting[i] for i in (3, 2, 1, 4)] and not made.waiting


def test_all_take_part_where_all_fit() -> None:
    made = scheduler(*(generation(n) for n in (30, 10, 20)), tokens=60)
    assert len(made.pick()) == 3
    assert made.pick() == made.running


def test_a_long_canvas_and_short_ones_get_equally_many_tokens() -> None:
    """The long one never waits for long, and the short ones take part far more often."""
    long, short = generation(1000), [generation(50) for _ in range(4)]
    made = scheduler(long, *short, rows=5, tokens=1000)
    turns = [made.pick() for _ in range(400)]
    assert all(sum(each.row.canvas.layout.length for each in turn) <= 1000 for turn in turns)
    computed = [tokens(turns, each) for each in (long, *short)]
    assert max(computed) - min(computed) <= 2000
    waits = [i for i, turn in enumerate(turns) if long in turn]
    assert max(b - a for a, b in pairwise(waits)) <= 25


def test_who_comes_later_does_not_hold_up_those_before() -> None:
    old = [generation(100) for _ in range(2)]
    made = scheduler(*old, rows=3, tokens=200)
    for _ in range(50):
        made.pick()
    late = generation(100)
    made.add([late])
    turns = [made.pick() for _ in range(30)]
    assert [sum(each in turn for turn in turns) for each in (*old, late)] == [20, 20, 20]


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=12),
    tokens=st.integers(64, 200),
    rows=st.integers(1, 12),
)
def test_everybody_gets_a_turn_and_no_forward_is_too_large(lengths: list[int], tokens: int, rows: int) -> None:
    made = scheduler(*(generation(n) for n in lengths), rows=rows, tokens=tokens)
    left = {id(each) for each in made.waiting}
    for _ in range(sum(200 // length + 1 for length in lengths)):  # enough even if each has all turns to itself
        turn = made.pick()
        assert turn and len(turn) <= rows and sum(each.row.canvas.layout.length for each in turn) <= tokens
        for each in turn:
            left.discard(id(each))
            if each.served is not None and each.served > 200:
                made.remove(each)
        if made.empty:
            break
    assert not left


def test_a_cached_step_costs_what_it_feeds() -> None:
    cached = generation(64, cache=CacheMode.DUAL)
    assert cached.cost == 64
    next(run([cached.row], predictor()))
    assert cached.cost == 8
