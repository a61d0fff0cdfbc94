"""Live view of a canvas in the terminal."""

from collections.abc import Callable

from rich.panel import Panel
from rich.text import Text

from samplers.loop.event import StepEvent
from samplers.loop.row import Row

# Low to high confidence, in colours distinguishable by colour-blind readers (Okabe and Ito).
SHADES = ("#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#009E73")
MASK, END = " ░░", " ∎"


def shade(confidence: float) -> str:
    """Colour of a committed token, in steps of 0.2."""
    return SHADES[min(int(confidence * len(SHADES)), len(SHADES) - 1)]


def printable(token: str) -> str:
    """Text of a token without terminal control sequences."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in token)


class CanvasView:
    """View of a generation region: tokens coloured by confidence, the newest in reverse video, masked positions dim.

    Args:
        row: the generation, read at each rendering.
        token: function from a token id to its text.
    """

    def __init__(self, row: Row, token: Callable[[int], str]) -> None:
        self._row = row
        self._token = token
        self._confidence: dict[int, float] = {}
        self._newest: set[int] = set()
        self._draft: list[int] = []

    def show(self, event: StepEvent) -> None:
        """Record the outcome of one step."""
        self._confidence |= dict(zip(event.positions, event.confidences, strict=True))
        self._newest = set(event.positions)
        self._draft = event.draft

    def text(self) -> Text:
        """The region as styled text, without settled padding after the end of text."""
        text = Text()
        drafted = iter(self._draft)
        masked, tokens = self._row.canvas.masked.tolist(), self._row.canvas.generated.tolist()
        for position, (hidden, token) in enumerate(zip(masked, tokens, strict=True)):
            if hidden:
                draft = next(drafted, None)
                text.append(MASK if draft is None else printable(self._token(draft)), style="dim")
            elif position == self._row.end:
                text.append(END, style="bold")
            elif self._row.end is None or position < self._row.end:
                newest = " bold reverse" if position in self._newest else ""
                text.append(printable(self._token(token)), style=shade(self._confidence[position]) + newest)
        return text

    def __rich__(self) -> Panel:
        row = self._row
        left = int(row.canvas.masked.sum())
        title = f"forward {row.forwards} | {left} masked | {row.completion_tokens} tokens settled"
        legend = Text.assemble("confidence 0 ", *((" ", f"on {colour}") for colour in SHADES), " 1")
        return Panel(self.text(), title=title, title_align="left", subtitle=legend, subtitle_align="right")
