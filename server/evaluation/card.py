"""The place in a model card where the measured table goes."""

from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- unmask evaluate: begin -->", "<!-- unmask evaluate: end -->"


def place(text: str) -> str:
    """The place itself, holding `text`."""
    return f"{BEGIN}\n{text.strip()}\n{END}"


@dataclass(frozen=True)
class Card:
    """A card and what stands around the place."""

    path: Path
    before: str
    after: str

    @classmethod
    def read(cls, folder: Path) -> "Card":
        """The card of a model folder. Raises ValueError if there is none or it has no place for a table."""
        path = folder / "README.md"
        try:
            content = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        before, begin, rest = content.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{path}: has no lines {BEGIN} and {END} for the table to go between")
        return cls(path, before, after)

    def write(self, text: str) -> None:
        """Put `text` in the place of what was there; a kill at any point leaves the old card or the new one."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(self.before + place(text) + self.after, encoding="utf-8")
        partial.replace(self.path)
