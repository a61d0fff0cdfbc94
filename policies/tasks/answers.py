r"""Answers in completions, read and compared: for any text, without raising, in linear time.

Where the answer is: the last `\boxed{}` or `<answer>`, as the paper scores GSM8K and MATH (arXiv 2512.09106).
"""

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice

from policies.tasks.latex import normal_form

TOLERANCE = Fraction(1, 10**6)
"""Largest difference of equal numbers."""
LONGEST_NUMBER = 100
"""Most characters of a number; a longer run of digits is ignored."""

_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)|\\.|[{}]", re.DOTALL)
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]++)?|\.[0-9]++)"
_OVER = rf"(?:\{{\s?(?P<over>-?{_DECIMAL})\s?\}}|(?P<over_digit>[0-9]))"
_UNDER = rf"(?:\{{\s?(?P<under>-?{_DECIMAL})\s?\}}|(?P<under_digit>[0-9]))"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![0-9A-Za-z)])-\s?)? [$€£]?\s?
    (?:
        (?:(?P<whole>{_WHOLE})\s?)? \\[dtc]?frac\s?{_OVER}\s?{_UNDER}
        | (?:(?P<mixed>{_WHOLE})\s)? (?P<over_slash>{_DECIMAL})\s?/\s?(?P<under_slash>{_DECIMAL})
        | (?P<decimal>{_DECIMAL})
    )
    """,
    re.VERBOSE,
)
# How digits are grouped in threes where it is not by a plain comma.
_GROUPED = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\[,!;:]\s?|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")


def boxed(text: str) -> str | None:
    r"""Content of the last closed `\boxed{...}`, with balanced braces; or the text after a `\boxed` without braces."""
    found: tuple[int, str] | None = None
    opened: list[int | None] = []
    for token in _BOX.finditer(text):
        start = token.end()
        if token[0] == "{" or token[1]:
            opened.append(start if token[1] else None)
        elif token[0] == "}":
            box = opened.pop() if opened else None
            if box is not None and (found is None or box > found[0]):
                found = box, text[box : token.start()]
        elif token[1] is not None:
            found = start, _unbraced(text, start)
    return found[1].strip() if found is not None else None


def _unbraced(text: str, start: int) -> str:
    """The text up to the end of the formula if that is on this line, else one word."""
    line = text[start : start + LONGEST_NUMBER].partition("\n")[0]
    formula, dollar, _ = line.partition("$")
    return formula if dollar else "".join(line.split()[:1])


def tagged(text: str) -> str | None:
    """Content of the last closed `<answer>...</answer>`."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    return text[start:].removeprefix("<answer>").partition("</answer>")[0].strip() if start >= 0 else None


def hashed(text: str) -> str | None:
    """The rest of the line after the last `####`, which ends GSM8K's own solutions."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark else None


def numbers(text: str) -> Iterator[Fraction]:
    r"""The numbers of a text in order: `-$1,234.50`, `1\,000`, `3/4`, `\frac34`, `2\frac{1}{2}`, whatever the unit."""
    text = _GROUPED.sub(lambda found: "," if "," in found[0] else "", text.replace("\N{MINUS SIGN}", "-"))
    found = (_value(match) for match in _NUMBER.finditer(text.replace("\\$", "$")))
    return (number for number in found if number is not None)


def first_number(text: str) -> Fraction | None:
    """The first number of a text."""
    return next(numbers(text), None)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a matched number; None for a denominator of zero, or a number that is too long."""
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    sign = -1 if match["sign"] else 1
    if match["decimal"]:
        return sign * _exact(match["decimal"])
    over, under = (
        _exact(match[part] or match[f"{part}_digit"] or match[f"{part}_slash"]) for part in ("over", "under")
    )
    return sign * (_exact(match["whole"] or match["mixed"] or "0") + over / under) if under else None


def _exact(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


def answer_number(completion: str) -> Fraction | None:
    r"""The first number in the last `\boxed{}`, else in the last `<answer>`, else after the last `####`."""
    for place in (boxed, tagged, hashed):
        if (number := first_number(place(completion) or "")) is not None:
            return number
    return None


def answer_math(completion: str) -> str | None:
    r"""Content of the last `\boxed{}`, else of the last `<answer>`; None if there is neither, or it is empty."""
    return boxed(completion) or tagged(completion) or None


def equal_numbers(one: Fraction | None, other: Fraction | None) -> bool:
    """True if both numbers exist and differ by at most `TOLERANCE`."""
    return one is not None and other is not None and abs(one - other) <= TOLERANCE


def same_text(completion: str, answer: str) -> bool:
    """True if the completion is the answer, apart from spaces and line breaks."""
    return completion.split() == answer.split()


def same_number(completion: str, answer: str) -> bool:
    """True if the completion's marked number (see `answer_number`), or else its only number, equals the answer's."""
    found = answer_number(completion)
    if found is None and len(alone := list(islice(numbers(completion), 2))) == 1:
        found = alone[0]
    return equal_numbers(found, first_number(answer))


def same_math(completion: str, answer: str) -> bool:
    """True if the completion's marked formula (see `answer_math`), or else all of it, has the answer's normal form."""
    return normal_form(answer_math(completion) or completion) == normal_form(answer)


CHECKERS: dict[str, Callable[[str, str], bool]] = {"exact": same_text, "number": same_number, "math": same_math}
"""Comparisons of a completion with an answer, by the names that users choose from."""
