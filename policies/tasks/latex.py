r"""Normal form of LaTeX answers: `0.5`, `\dfrac12` and `$\frac{1}{2}.$` become the same text.

The rules are those that the MATH benchmark is scored by (Hendrycks et al., arXiv 2103.03874, and their published
`is_equiv`), applied to TeX tokens instead of substrings. It does no algebra: `2/4` is not `1/2`, nor is `x+1` `1+x`.
"""

import re
from fractions import Fraction
from functools import lru_cache

LONGEST = 400
"""Most characters; a longer answer is compared literally. The longest of the MATH benchmark has under 200."""
DEEPEST = 30
"""Deepest nesting of braces; an answer with more is compared literally."""

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_SIZES = ("left", "right", "big", "Big", "bigl", "bigr", "Bigl", "Bigr", "displaystyle", "textstyle", "limits")
_SPACES = ("!", ",", ";", ":", "quad", "qquad")
_UNSEEN = {f"\\{name}" for name in (*_SIZES, *_SPACES, "$", "%", "(", ")", "[", "]", "degree")} | set("$%°~")
"""Tokens of typesetting, or of a unit."""
_OTHER_NAMES = {
    **dict.fromkeys(("\\dfrac", "\\tfrac", "\\cfrac"), "\\frac"),
    **{"\\le": "\\leq", "\\ge": "\\geq", "\\ne": "\\neq", "\\lbrace": "\\{", "\\rbrace": "\\}"},
    **{"\N{MINUS SIGN}": "-", "π": "\\pi", "∞": "\\infty", "≤": "\\leq", "≥": "\\geq", "√": "\\sqrt"},
}
_WORDS = {f"\\{name}" for name in ("text", "textbf", "textit", "textrm", "mbox", "mathrm", "mathbf", "operatorname")}
"""Commands whose argument is plain text."""
_UNIT_WORDS = {f"\\{name}" for name in ("text", "textrm", "mbox", "mathrm")}
r"""Commands that units are written with. A single letter in `\mathrm` is a constant or a vector."""

# A backslash too many, as in text that was escaped twice; not a matrix's line break.
_DOUBLED = re.compile(r"(?<!\\)\\\\(?=(?:[dtc]?frac|sqrt|text|mathrm|left|right|pi)(?![a-zA-Z]))")
# Not in a tuple: (100,200) is a point, 100,200 is a number.
_THOUSANDS = re.compile(r"(?<![0-9,.(\[])(?<!\\\{)[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_MIXED = re.compile(r"(?<![0-9.])([0-9]+) ([0-9]+)/([0-9]+)")
_DECIMAL = re.compile(r"(?<![0-9.])([0-9]*+)\.([0-9]*+)(?!\.)")
_SCALES = r"cm|mm|km|kg|mi|ft|inch(?:es)?|feet|foot|yards?|miles?|(?:centi|kilo|milli)?met(?:er|re)s?|grams?|pounds?"
_TIMES = r"hours?|minutes?|seconds?|days?|weeks?|months?|years?"
_COUNTS = r"degrees?|dollars?|cents?|units?|percent|perhour|persecond|mph"
_UNITS = re.compile(rf"(?<=[0-9}}])(?:(?:square|cubic|sq)?(?:{_SCALES}|{_TIMES}|{_COUNTS})(?:\^\{{[23]\}})?)+$")
_MEASURE = re.compile(r"[0-9]$|[0-9\\].*[0-9a-zA-Z})]$")
_ASSIGNED = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{[^{}]*\})?(?:\([a-z]\))?(?:=|\\in(?![a-zA-Z]) ?)(?=.)")
_OPENING = re.compile(r"(?:[(\[]|\\\{)*")
_CLOSING = re.compile(r"(?:[)\]]|\\\})*$")
_TERM = r"(?=[^/])[0-9]*(?:\\pi|[a-zA-Z]|\\sqrt\{[0-9]+\})?"
_SLASH = re.compile(rf"(-?)({_TERM})/([0-9]+)")
_SIGNED = re.compile(r"(-?)\\frac\{(-?)([0-9a-zA-Z\\ ]+)\}\{(-?)([0-9a-zA-Z\\ ]+)\}")


def normal_form(answer: str) -> str:
    """The spelling that all answers of this meaning share. Any text is accepted; a normal form is its own."""
    text = " ".join(answer.split())
    return text if len(text) > LONGEST else _normal_form(text)


@lru_cache(maxsize=1 << 14)
def _normal_form(text: str) -> str:
    # One rule can make room for another; none undoes another's work, so this ends after two or three rounds.
    for _ in range(LONGEST):
        try:
            simpler = _simplify(text)
        except _TooDeepError:
            return text
        if simpler == text:
            break
        text = simpler
    return text


def _simplify(text: str) -> str:
    text = re.sub(r"\\!\s?", "", _DOUBLED.sub(r"\\", text)).replace("{,}", ",")
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    parts = [_element(element) for element in _elements(_Reader(text).group(0))]
    if len(parts) == 1 and re.fullmatch(r"\([a-zA-Z]\)", parts[0]):
        return parts[0][1]
    return ", ".join(parts).strip()


def _elements(text: str) -> list[str]:
    """Split at commas, except inside braces."""
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token == "{") - (token == "}")
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _element(text: str) -> str:
    """Normalise one number or expression; brackets around it may close in another element."""
    text = text.strip().rstrip(".;:")
    opening = _OPENING.match(text)
    start = opening.end() if opening else 0
    closing = _CLOSING.search(text, start)
    end = closing.start() if closing else len(text)
    return text[:start] + _value(text[start:end].rstrip(".;:")) + text[end:]


def _value(text: str) -> str:
    if text.count("=") <= 1 and (assigned := _ASSIGNED.match(text)):
        text = text[assigned.end() :]
    text = _DECIMAL.sub(_decimal, _UNITS.sub("", text))
    if re.fullmatch(r"\+[0-9.]+", text):
        text = text[1:]
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", text):
        exact = Fraction(text)
        return f"{'-' if exact < 0 else ''}\\frac{{{abs(exact.numerator)}}}{{{exact.denominator}}}"
    if slash := _SLASH.fullmatch(text):
        return f"{slash[1]}\\frac{{{slash[2]}}}{{{slash[3]}}}"
    if signed := _SIGNED.fullmatch(text):
        minus = "-" if (signed[1] + signed[2] + signed[4]).count("-") % 2 else ""
        return f"{minus}\\frac{{{signed[3]}}}{{{signed[5]}}}"
    return text


def _decimal(number: re.Match[str]) -> str:
    """Normalise a decimal number: `.50` becomes `0.5`, `5.0` becomes `5`."""
    whole, rest = number[1], number[2].rstrip("0")
    if not whole and not number[2]:
        return number[0]
    return f"{whole or '0'}.{rest}" if rest else whole or "0"


class _TooDeepError(Exception):
    pass


def _deeper(depth: int) -> int:
    if depth == DEEPEST:
        raise _TooDeepError
    return depth + 1


class _Reader:
    """Rewriting of TeX with every argument in braces, and without other braces, spaces, sizes or units."""

    def __init__(self, text: str) -> None:
        tokens = (token for token in _TOKEN.findall(text) if not (token.isspace() or token[1:].isspace()))
        self._tokens = [_OTHER_NAMES.get(token, token) for token in tokens if token not in _UNSEEN]
        self._at = 0

    def group(self, depth: int) -> str:
        """Rewrite everything up to the brace that closes this group, and read past it."""
        written = ""
        while (token := self._next()) is not None:
            if token == "}" and depth:
                break
            written = _join(written, self._atom(token, written, depth))
        return written

    def _peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _next(self) -> str | None:
        token = self._peek()
        self._at += token is not None
        return token

    def _argument(self, depth: int) -> str:
        """Rewrite a group, or one token with its own arguments; empty where the enclosing group ends."""
        token = self._peek()
        if token is None or token == "}":
            return ""
        self._at += 1
        return self.group(_deeper(depth)) if token == "{" else self._atom(token, "", _deeper(depth))

    def _atom(self, token: str, before: str, depth: int) -> str:
        """Rewrite a token with its arguments. `before` is the group's text so far."""
        if token == "{":
            inner = self.group(_deeper(depth))
            return f"{{{inner}}}" if re.search(r"\\[a-zA-Z]+$", before) else inner
        if token == "}":
            return ""
        if token in ("^", "_"):
            argument = self._argument(depth)
            return "" if (token, argument) == ("^", "\\circ") else f"{token}{{{argument}}}"
        if token in ("\\frac", "\\binom"):
            return f"{token}{{{self._argument(depth)}}}{{{self._argument(depth)}}}"
        if token == "\\sqrt":
            return f"\\sqrt{self._root()}{{{self._argument(depth)}}}"
        if token in _WORDS:
            return self._words(token, before, depth)
        return token

    def _root(self) -> str:
        rest = self._tokens[self._at :]
        if rest[:1] != ["["] or "]" not in rest:
            return ""
        end = rest.index("]") + 1
        self._at += end
        return "".join(rest[:end])

    def _words(self, command: str, before: str, depth: int) -> str:
        """Rewrite text: a separator, a unit after a number (dropped), or an answer in words."""
        words = self._argument(depth)
        if words in ("and", "or"):
            return ","
        number = before.rpartition(",")[2]
        if command in _UNIT_WORDS and (command, len(words)) != ("\\mathrm", 1) and _MEASURE.search(number):
            at = self._at
            if self._peek() == "^":
                self._next()
                self._argument(depth)
            if self._peek() in (None, ",", ".", ")", "]", "}", "\\}"):
                return ""
            self._at = at
        return words


def _join(written: str, piece: str) -> str:
    """Join two texts, with a space between a command and a letter."""
    apart = re.search(r"\\[a-zA-Z]+$", written) and re.match(r"[a-zA-Z]", piece)
    return f"{written} {piece}" if apart else written + piece
