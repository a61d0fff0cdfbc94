"""Our denoising loop, run from an original's prompts, against the original's record of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from samplers.forward.query import Predict
from samplers.loop.row import Row
from samplers.loop.run import run
from tests.conformance.report import Difference

Tokens = list[int]


@dataclass(frozen=True)
class Recording:
    """Per row: the canvas after each forward that it took part in, and the block each of them worked on."""

    states: list[list[Tokens]]
    blocks: list[list[int]]

    def lockstep_forwards(self, least: int = 1) -> int:
        """Forwards, `least` a block or more, of a loop in which a block begins when all rows have finished the last.

        The originals do. Our rows do not wait for each other, so ours can be fewer.
        """
        last = max(max(row) for row in self.blocks)
        return sum(max(least, *(row.count(block) for row in self.blocks)) for block in range(last + 1))


def replay(rows: Sequence[Row], predict: Predict, most: int | None = None) -> Recording:
    """Run the loop to the end of all rows, or for so many forwards, and write down what it did."""
    recording = Recording([[] for _ in rows], [[] for _ in rows])
    index = {id(row): i for i, row in enumerate(rows)}
    blocks = [row.block for row in rows]
    for turn in islice(run(rows, predict, may_wait=True), most):
        for row, event in turn:
            if event.error is not None:
                raise event.error
            i = index[id(row)]
            recording.states[i].append(row.canvas.tokens.tolist())
            recording.blocks[i].append(blocks[i])
            blocks[i] = row.block
    return recording


def compare_states(ours: list[Tokens], originals: list[Tokens], row: int) -> None:
    """Every state of a row against the original's, in which a row that waits for others repeats its state."""
    expected = [state for state, _ in groupby(originals)]
    for number, (got, want) in enumerate(zip(ours, expected, strict=False), start=1):
        for position, (a, b) in enumerate(zip(got, want, strict=True)):
            if a != b:
                raise Difference(f"row {row}, forward {number}, position {position}: token {a}, the original has {b}")
    if len(ours) != len(expected):
        raise Difference(f"row {row}: {len(ours)} forwards, the original needs {len(expected)}")


def distinct(states: list[Tokens]) -> list[Tokens]:
    """Without those that repeat the one before, as `compare_states` has the original's."""
    return [state for state, _ in groupby(states)]
