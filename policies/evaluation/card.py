"""Model cards, and the marked place in them for the measured table."""

from dataclasses import dataclass
from pathlib import Path

from policies.files.atomic import write_file
from policies.files.regular import read_text

MOST_BYTES = 16 << 20
BEGIN, END = "<!-- unmask evaluate: begin -->", "<!-- unmask evaluate: end -->"


def place(text: str) -> str:
    """The marked place with `text` in it."""
    return f"{BEGIN}\n{text.strip()}\n{END}"


@dataclass(frozen=True)
class Card:
    """A model card: the text before and after the marked place."""

    path: Path
    before: str
    after: str

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """Read the card of a model folder. Raises ValueError if there is none, or no marked place in it."""
        path = folder / "README.md"
        try:
            content = read_text(path, MOST_BYTES)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {error}") from None
        before, begin, rest = content.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{path}: has no lines {BEGIN} and {END} for the table to go between")
        return cls(path, before, after)

    def write(self, text: str) -> None:
        """Replace what the place holds; a kill at any point leaves the old card or the new one."""
        write_file(self.path, self.before + place(text) + self.after)
