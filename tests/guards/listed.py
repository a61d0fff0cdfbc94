"""The list of guards: TOML files beside this one, by area."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Guard:
    """A protection that somebody relies on, how to take it out, and who is to notice.

    Attributes:
        area: name of the TOML file that lists it.
        name: what it protects from, in one line.
        file: where it is, relative to the checkout.
        old: text of the file, which occurs once.
        new: what to put in its place, so that the guard is gone and all else is as before.
        tests: pytest's names of the tests of which at least one must fail then.
    """

    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def removed(self, source: str) -> str:
        """The file's text without the guard. Raises ValueError unless the old text occurs exactly once."""
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.area}: {self.name}: its text occurs {count} times in {self.file}, not once")
        return source.replace(self.old, self.new)


def guards() -> list[Guard]:
    """All guards, by area, in the order of their files."""
    found = []
    for path in sorted(HERE.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["guard"]:
            found.append(Guard(area=path.stem, **entry | {"tests": tuple(entry["tests"])}))
    return found
