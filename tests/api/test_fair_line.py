"""The line of those whose texts are worked on: whose turn it is, and who has to go."""

import asyncio

import pytest

from server.api.fair_line import FairLine
from server.engine import Owner


class FullError(Exception):
    pass


class Hall:
    """A line, and what became of those who came, by name.

    Args:
        seconds: what each takes.
        opened: whether they are served as they come, or all once `end` is called, whatever the machine does meanwhile.
    """

    def __init__(self, most: int = 100, at_once: int = 1, seconds: float = 0.001, opened: bool = True) -> None:
        self.line = FairLine(at_once, most, FullError)
        self.served: list[str] = []
        self.sent_away: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.seconds = seconds
        self.open = asyncio.Event()
        if opened:
            self.open.set()

    async def come(self, name: str, owner: Owner, size: int = 1) -> None:
        self.tasks[name] = asyncio.create_task(self._one(name, owner, size))
        for _ in range(2):
            await asyncio.sleep(0)

    async def _one(self, name: str, owner: Owner, size: int) -> None:
        try:
            turn = await self.line.enter(owner, size)
        except FullError:
            self.sent_away.append(name)
            return
        self.served.append(name)
        try:
            await self.open.wait()
            await asyncio.sleep(self.seconds)
        finally:
            self.line.leave(turn)

    async def end(self) -> None:
        self.open.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert self.line.inside == 0 and not self.line._groups.accounts


HEAVY, LIGHT, OTHER = Owner("heavy", "a"), Owner("light", "b"), Owner("other", "a")


@pytest.mark.asyncio
async def test_groups_take_turns_by_bytes() -> None:
    hall = Hall(opened=False)
    for i in range(6):
        await hall.come(f"heavy {i}", HEAVY, 4000)
    for i in range(3):
        await hall.come(f"light {i}", LIGHT, 1000)
    await hall.end()
    assert hall.served[:4] == ["heavy 0", "light 0", "light 1", "light 2"]
    assert hall.served[4:] == [f"heavy {i}" for i in range(1, 6)]


@pytest.mark.asyncio
async def test_who_brings_little_is_served_before_those_who_bring_much() -> None:
    hall = Hall(seconds=0.05)
    for i in range(6):
        await hall.come(f"heavy {i}", Owner(f"connection {i}", "a"), 4000)
    await asyncio.wait([hall.tasks["heavy 1"]])
    for i in range(2):
        await hall.come(f"other {i}", OTHER, 70)
    await hall.end()
    assert hall.served[3:5] == ["other 0", "other 1"]


@pytest.mark.asyncio
async def test_what_is_long_is_served_while_short_ones_keep_coming() -> None:
    hall = Hall()
    await hall.come("first", HEAVY, 100)
    await hall.come("long", HEAVY, 400)
    for i in range(20):
        await hall.come(f"short {i}", Owner(f"connection {i // 2}", "a"), 100)
        await asyncio.sleep(0.001)
    await hall.end()
    assert hall.served.index("long") < 10


@pytest.mark.asyncio
async def test_where_it_is_full_the_largest_group_gives_way() -> None:
    hall = Hall(most=4, opened=False)
    for i in range(6):
        await hall.come(f"heavy {i}", HEAVY, 4000)
    assert hall.sent_away == ["heavy 4", "heavy 5"]
    for i in range(3):
        await hall.come(f"light {i}", LIGHT, 5000)
    assert hall.sent_away[2:] == ["heavy 3", "heavy 2", "light 2"], "of equal ones the newest"
    await hall.end()
    assert len(hall.served) == 4


@pytest.mark.asyncio
async def test_within_a_group_who_would_be_last_gives_way() -> None:
    hall = Hall(most=3, opened=False)
    for i in range(3):
        await hall.come(f"heavy {i}", Owner(f"connection {i}", "a"), 4000)
    await hall.come("other", OTHER, 70)
    assert hall.sent_away == ["heavy 2"]
    await hall.end()
    assert hall.served == ["heavy 0", "other", "heavy 1"]


@pytest.mark.asyncio
async def test_as_many_are_served_at_once_as_there_are_threads() -> None:
    hall = Hall(at_once=2, opened=False)
    for i in range(4):
        await hall.come(str(i), HEAVY)
    await asyncio.sleep(0)
    assert hall.served == ["0", "1"]
    await hall.end()
    assert hall.served == ["0", "1", "2", "3"]


@pytest.mark.asyncio
async def test_who_is_ended_takes_no_place() -> None:
    hall = Hall(opened=False)
    for i in range(5):
        await hall.come(str(i), HEAVY)
    hall.tasks["2"].cancel()  # waits
    await asyncio.sleep(0)
    assert hall.line.inside == 4
    hall.tasks["0"].cancel()  # is served
    await asyncio.sleep(0)
    hall.tasks["1"].cancel()  # was called just now
    await hall.end()
    assert hall.served == ["0", "3", "4"]
