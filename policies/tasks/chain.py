"""Chained word problems: a story of changes to a number of things, solved line by line."""

import random
import re
from dataclasses import dataclass

from policies.tasks.base import Problem, Task

HE = ("Tom", "Max", "Sam", "Ben", "Leo")
SHE = ("Mia", "Ana", "Eva", "Zoe", "Ida")
THINGS = ("apples", "books", "coins", "cards", "shells", "stamps", "pens", "cups", "marbles", "stickers")
PACKS = ("boxes", "bags", "packs")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("loses", "sells", "drops", "hides")
OPENERS = ("First", "Well", "Okay", "Start")
LINKS = ("Then", "Next", "Now", "After")
ENDINGS = ("So", "Thus", "Hence", "Therefore")

LARGEST = 99
Piece = tuple[str, int | None]


@dataclass(frozen=True)
class Change:
    """One sentence of the story: `sign` and `by`, and for packs the two factors that make up `by`."""

    sign: str
    by: int
    factors: tuple[int, int] | None = None

    def apply(self, total: int) -> int:
        match self.sign:
            case "+":
                return total + self.by
            case "-":
                return total - self.by
            case "*":
                return total * self.by
            case _:
                return total // self.by

    def key(self) -> str:
        return f"{self.sign}{self.by}" + (f"={self.factors[0]}*{self.factors[1]}" if self.factors else "")


@dataclass(frozen=True)
class Story:
    name: str
    thing: str
    start: int
    changes: tuple[Change, ...]

    def key(self) -> str:
        return " ".join([str(self.start), *(change.key() for change in self.changes)])

    def totals(self) -> list[int]:
        totals = [self.start]
        for change in self.changes:
            totals.append(change.apply(totals[-1]))
        return totals


def draw_change(rng: random.Random, total: int, packs_left: int) -> Change:
    """Draw a change that keeps the number of things within 1..99."""
    while True:
        kind = rng.choice(("gain", "gain", "loss", "loss", "packs", "packs", "scale"))
        if kind == "gain":
            change = Change("+", rng.randint(1, 9))
        elif kind == "loss":
            change = Change("-", rng.randint(1, 9))
        elif kind == "packs" and packs_left:
            a, b = rng.randint(2, 4), rng.randint(2, 6)
            change = Change(rng.choice("+-"), a * b, (a, b))
        elif kind == "scale":
            change = rng.choice((Change("*", 2), Change("*", 3), Change("/", 2)))
        else:
            continue
        if change.sign == "/" and total % 2:
            continue
        if 1 <= change.apply(total) <= LARGEST:
            return change


def draw_story(rng: random.Random, steps: tuple[int, int]) -> Story:
    start = total = rng.randint(2, 60)
    changes: list[Change] = []
    for _ in range(rng.randint(*steps)):
        packs = sum(change.factors is not None for change in changes)
        changes.append(draw_change(rng, total, packs_left=2 - packs))
        total = changes[-1].apply(total)
    return Story(rng.choice(HE + SHE), rng.choice(THINGS), start, tuple(changes))


def tell(story: Story, rng: random.Random) -> str:
    """Tell the story in words, with verbs drawn at random."""
    who = "He" if story.name in HE else "She"
    sentences = [f"{story.name} has {story.start} {story.thing}."]
    for change in story.changes:
        if change.factors:
            a, b = change.factors
            verb = rng.choice(GAINS if change.sign == "+" else LOSSES)
            sentences.append(f"{who} {verb} {a} {rng.choice(PACKS)} of {b}.")
        elif change.sign == "+":
            sentences.append(f"{who} {rng.choice(GAINS)} {change.by} more.")
        elif change.sign == "-":
            sentences.append(f"{who} {rng.choice(LOSSES)} {change.by} of them.")
        elif change.sign == "*":
            sentences.append(f"The number {'doubles' if change.by == 2 else 'triples'}.")
        else:
            sentences.append(f"{who} gives half of them away.")
    sentences.append(f"How many {story.thing} does {story.name} have now?")
    return " ".join(sentences)


def work_out(story: Story, rng: random.Random) -> list[Piece]:
    """The solution, one piece per token of the embedded tokenizer.

    A piece that shows a computed intermediate value carries that value's number: pieces with the same number show the
    same value.
    """
    pieces: list[Piece] = []
    totals = story.totals()
    shown: int | None = None
    values = 0
    for i, change in enumerate(story.changes):
        pieces.append((" " + rng.choice(LINKS), None) if i else (rng.choice(OPENERS), None))
        by: Piece = (f" {change.by}", None)
        if change.factors:
            a, b = change.factors
            by = (f" {change.by}", values)
            pieces += [(f" {a}", None), (" *", None), (f" {b}", None), (" =", None), by, (" and", None)]
            values += 1
        pieces += [(f" {totals[i]}", shown), (f" {change.sign}", None), by, (" =", None)]
        shown = values
        values += 1
        pieces += [(f" {totals[i + 1]}", shown), (".", None)]
    last: Piece = (f" {totals[-1]}", shown)
    pieces += [(" " + rng.choice(ENDINGS), None), (f" {story.name}", None), (" has", None), last]
    return [*pieces, (f" {story.thing}", None), (".", None), (" ####", None), last]


def equation(rng: random.Random) -> list[Piece]:
    """Draw a single line of working; the value to compute carries number 0."""
    while True:
        left, sign = rng.randint(1, LARGEST), rng.choice("++--*/")
        if sign in "+-" and rng.random() < 0.3:
            right = rng.randint(2, 4) * rng.randint(2, 6)
        elif sign in "+-":
            right = rng.randint(1, 9)
        elif sign == "*":
            left, right = (rng.randint(1, 49), 2) if rng.random() < 0.4 else (rng.randint(1, 33), rng.randint(2, 6))
        else:
            left, right = 2 * rng.randint(1, 49), 2
        result = Change(sign, right).apply(left)
        if 1 <= result <= LARGEST:
            shown: list[Piece] = [(f" {left}", None), (f" {sign}", None), (f" {right}", None), (" =", None)]
            return [*shown, (f" {result}", 0), (".", None)]


class Chain(Task):
    """Two to six changes, each depending on the result before; link words are free."""

    name = "chain"
    description = "word problems of two to six changes to a number of things, solved line by line"
    gen_length = 64
    steps = (2, 6)

    def sample_worked(self, rng: random.Random) -> tuple[Problem, list[Piece]]:
        """Draw a problem and the pieces of its reference (see `work_out`)."""
        story = draw_story(rng, self.steps)
        pieces = work_out(story, rng)
        answer = str(story.totals()[-1])
        reference = "".join(text for text, _ in pieces)
        return Problem(self.name, story.key(), tell(story, rng), answer, reference), pieces

    def sample(self, rng: random.Random) -> Problem:
        return self.sample_worked(rng)[0]

    def check(self, problem: Problem, completion: str) -> bool:
        found = re.search(r"####\s*(\d+)\s*$", completion.strip())
        return found is not None and found.group(1) == problem.answer

    def interchangeable(self) -> tuple[tuple[str, ...], ...]:
        return (OPENERS, tuple(f" {word}" for word in LINKS), tuple(f" {word}" for word in ENDINGS))
