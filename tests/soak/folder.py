"""A folder of policies in which something changes all the time."""

import json
import random
import shutil
from pathlib import Path

from policies.serving.checkpoint import CARD, WEIGHTS, save_policy
from tests.policies.tiny import card, network

NAMES = ("red", "green", "blue")


class ChangingFolder:
    """Policies that are written, replaced, broken and removed under a server that watches their folder.

    Args:
        vocab_size: of the model that they are for.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder = folder
        self._vocab_size = vocab_size

    def write(self, name: str, seed: int) -> None:
        trained = {"vocab_size": self._vocab_size, "gen_lengths": (16,)}
        save_policy(network(seed, output_bias=seed % 13 - 6.0), card(trained_on=trained), self.folder / name)

    def change(self, chance: random.Random) -> None:
        """One change: mostly a new checkpoint."""
        name = chance.choice(NAMES)
        place = self.folder / name
        kind = chance.random()
        if kind < 0.7 or not place.is_dir():
            shutil.rmtree(place, ignore_errors=True) if kind < 0.2 else None
            self.write(name, chance.randrange(1000))
        elif kind < 0.8:
            shutil.rmtree(place)
        elif kind < 0.9:
            (place / WEIGHTS).write_bytes(chance.randbytes(100))
        else:
            (place / CARD).write_text(json.dumps({"format": chance.randrange(9)}))
