"""Kill each writer at random, many times, and read what is left: `python -m tests.benchmarks.killed_writers`."""

import argparse
import random
import sys
import tempfile
from pathlib import Path

import torch

from tests.kills import kill_somewhere, watch
from tests.writers import all_writers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--within", type=float, default=0.06, help="seconds")
    parser.add_argument("--reads", type=float, default=3.0, help="seconds of reading while a policy is written")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    chance, broken = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        writers = all_writers(Path(folder))
        for writer in writers:
            place = Path(folder) / writer.name.replace(" ", "-")
            place.mkdir()
            wrong = []
            for _ in range(asked.kills):
                try:
                    writer.write(place, 0)
                except Exception as error:
                    wrong.append(f"next write: {type(error).__name__}: {error}"[:200])
                wrong += filter(None, [kill_somewhere(writer, place, asked.within, chance)])
            broken += len(wrong)
            print(f"{writer.name}: {asked.kills} kills, {len(wrong)} broken", *sorted(set(wrong))[:3], sep="\n  ")
        place = Path(folder) / "read"
        place.mkdir()
        reads, wrong = watch(writers[0], place, asked.reads)
        broken += len(wrong)
        print(
            f"{writers[0].name}: {reads} reads while it is written, {len(wrong)} broken",
            *sorted(set(wrong))[:3],
            sep="\n  ",
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
