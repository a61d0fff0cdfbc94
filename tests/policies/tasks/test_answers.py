r"""Answers read out of completions: hard cases, and texts that no one would write."""

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.tasks.answers import (
    CHECKERS,
    LONGEST_NUMBER,
    answer_math,
    answer_number,
    boxed,
    equal_numbers,
    first_number,
    hashed,
    same_math,
    same_number,
    tagged,
)
from policies.tasks.latex import DEEPEST, LONGEST, normal_form

PIECES = [
    *(
        "\\frac",
        "\\dfrac",
        "\\sqrt",
        "\\text",
        "\\mbox{ or }",
        "\\mathrm",
        "\\boxed",
        "\\circ",
        "\\pi",
        "\\in",
        "\\left",
    ),
    *(
        "\\{",
        "\\}",
        "\\!",
        "\\,",
        "\\\\",
        "\\",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "^",
        "_",
        "/",
        "=",
        "-",
        "+",
        ".",
        ",",
        ";",
    ),
    *("0", "1", "2", "000", "x", "a", "cm", "and", " ", "\n", "$", "%", "°", "√", "é", "####", "<answer>", "</answer>"),
]
tex = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
anything = st.one_of(st.text(), tex)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{72}", "72"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1, \{2\}\}}", r"\{1, \{2\}\}"),
        (r"\boxed{\left\{ 3 \right.}", r"\left\{ 3 \right."),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"{ a \boxed{5}", "5"),
        (r"} a \boxed{5}}", "5"),
        (r"\boxed{3} but then \boxed{4 cut off", "3"),
        (r"\boxed{3 never closed and \boxed{4}", "4"),
        (r"$\boxed 5$.", "5"),
        (r"$\boxed5$", "5"),
        (r"\boxed \frac12 is the answer", r"\frac12"),
        ("\\boxed\n{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed", ""),
        (r"\boxedtext{5}", None),
        (r"\boxed{5", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_what_is_in_the_box(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


def test_other_places_of_answers() -> None:
    assert tagged("<answer>1</answer> <answer>\n 2 </answer> <answer>3") == "2"
    assert tagged("<answer> 2") is tagged("2 </answer>") is tagged("</answer><answer>") is None
    assert hashed("#### 1\n#### 72 \nmore") == "72"
    assert hashed("## 72") is None


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        (r"\boxed{72}", 72),
        (r"\boxed{72.}", 72),
        (r"\boxed{$1,234.50}", Fraction("1234.5")),
        (r"\boxed{\$1{,}234{,}567}", 1234567),
        (r"\boxed{1\,000}", 1000),
        (r"\boxed{10,\!000}", 10000),
        ("\\boxed{1\u202f000}", 1000),
        (r"\boxed{12,34}", 12),
        (r"\boxed{1,2,3}", 1),
        (r"\boxed{1,0000}", 1),
        (r"\boxed{-5}", -5),
        (r"\boxed{- 5}", -5),
        ("\\boxed{\N{MINUS SIGN}5}", -5),
        (r"\boxed{-$5}", -5),
        (r"\boxed{+5}", 5),
        (r"\boxed{10-5}", 10),
        (r"\boxed{x-5}", 5),
        (r"\boxed{x = 8 \text{ or } 9}", 8),
        (r"\boxed{50\%}", 50),
        (r"\boxed{50%}", 50),
        (r"\boxed{72 \text{ km/h}}", 72),
        (r"\boxed{72km}", 72),
        (r"\boxed{\text{Room }3}", 3),
        (r"\boxed{.5}", Fraction(1, 2)),
        (r"\boxed{0.50}", Fraction(1, 2)),
        (r"\boxed{1/2}", Fraction(1, 2)),
        (r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\frac{-1}{2}}", Fraction(-1, 2)),
        (r"\boxed{\dfrac12}", Fraction(1, 2)),
        (r"\boxed{\tfrac{1,000}{4}}", 250),
        (r"\boxed{2\frac{1}{2}}", Fraction(5, 2)),
        (r"\boxed{2 1/2 cups}", Fraction(5, 2)),
        (r"\boxed{-2 1/2}", Fraction(-5, 2)),
        (r"\boxed{5/0}", None),
        (r"\boxed{5/0, or 7}", 7),
        (r"\boxed{\frac{5}{x}}", 5),
        (rf"\boxed{{{'9' * LONGEST_NUMBER}}}", int("9" * LONGEST_NUMBER)),
        (rf"\boxed{{{'9' * (LONGEST_NUMBER + 1)}}}", None),
        (r"3 + 4 = 7 so \boxed{7}", 7),
        (r"\boxed{7} <answer>8</answer>", 7),
        (r"\boxed{...} <answer>8</answer>", 8),
        ("<answer>\n\\boxed{8}\n</answer>", 8),
        ("<answer>It is 8.</answer>", 8),
        ("Tom has 5 + 67 = 72.\n#### 72", 72),
        ("#### 1,200 dollars", 1200),
        ("#### none\n5", None),
        ("72", None),
        ("٣", None),
        ("", None),
    ],
)
def test_the_number_of_an_answer(completion: str, number: Fraction | int | None) -> None:
    assert answer_number(completion) == number


def test_numbers_are_equal_within_the_tolerance() -> None:
    third = Fraction(1, 3)
    assert equal_numbers(third, first_number("0.333333"))
    assert not equal_numbers(third, first_number("0.33333"))
    assert not equal_numbers(None, None)
    assert not equal_numbers(third, None)
    big = 10**30
    assert not equal_numbers(Fraction(big), Fraction(big + 1)), "no rounding"


SAME = [
    (r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac1{2}", r"\frac{1}2", r"$\frac{1}{2}$.", "1/2", "0.5", ".50"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}", "-0.5", "-1/2", r"x = -\frac12"),
    (r"\\frac{3}{4}", r"\frac34", "0.75"),
    (r"\frac{\frac12}{3}", r"\frac{\dfrac{1}{2}}3"),
    (r"\frac{3\pi}{4}", r"3\pi/4", r"\frac{3 \pi}4"),
    (r"\frac{\pi}{2}", r"\frac\pi2", r"\pi/2", "π/2"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}", r"\sqrt{3}/2", r"\frac{√3}{2}"),
    (r"1\frac{1}{2}", r"1 \frac12", "1 1/2"),
    ("5", "5.", "5.0", "5.00", "+5", " 5 ", "{5}", "$5$", r"\$5", r"5\%", "5%", r"\text{5}", r"\mathbf{5}", r"\(5\)"),
    ("6", r"6\text{ cm}", r"6 \text{ cm}^2", r"6\mbox{ inches}", r"6\,\mathrm{cm}", "6 cm", "6 square units", "n=6"),
    ("90", r"90^\circ", r"90^{\circ}", "90°", "90 degrees", r"90\text{ degrees}"),
    ("10000", "10,000", r"10,\!000", r"10{,}000", r"10\,000", r"\$10,000", r"x=10,000"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("(1, 2)", "(1,2)", r"\left(1, 2\right)", r"( 1 , 2 )", r"\left( 1.0,\,2 \right)."),
    ("(100,200)", "(100, 200)"),
    (r"[0, \frac{1}{2})", r"\left[0,\frac12\right)", "[0,0.5)", r"x \in [0, 1/2)"),
    (r"(-\infty, 3] \cup [5, \infty)", r"(-\infty,3]\cup[5,\infty)", "(-∞,3]\\cup[5,∞)"),
    (r"\{1, 2\}", r"\left\{1,2\right\}", r"\lbrace 1,2\rbrace"),
    ("1, 2", "1,2", r"1 \text{ and } 2", r"1\text{ or }2", r"x=1 \text{ or } x=2"),
    (r"\sqrt{3}", r"\sqrt3", r"\sqrt 3", "√3"),
    (r"\sqrt[3]{2}", r"\sqrt[3]2"),
    ("x^2 + 3", "x^{2}+3", r"x^2\,+\,3", r"y = x^2+3", r"f(x) = x^2+3"),
    (r"\pi r^2", r"\pi  r^{2}", r"\pi\,r^2", "πr^2"),
    ("1010_2", "1010_{2}"),
    ("Evelyn", r"\text{Evelyn}", r"\textbf{Evelyn}", r"\text{ Evelyn }."),
    ("A", r"\text{(A)}", "(A)", r"\textbf{(A)}"),
    ("x \\leq 5", r"x\le5", "x ≤ 5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]  # fmt: skip


@pytest.mark.parametrize("spellings", SAME, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer(spellings: tuple[str, ...]) -> None:
    forms = {spelling: normal_form(spelling) for spelling in spellings}
    assert len(set(forms.values())) == 1, forms


def test_different_answers_stay_different() -> None:
    """Of all groups above, and what is only nearly the same."""
    firsts = [normal_form(spellings[0]) for spellings in SAME]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("5", "-5"),
        ("5", "50"),
        ("0.5", "0.05"),
        (r"\frac{2}{4}", r"\frac{1}{2}"),
        ("11/2", "1 1/2"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(0,1)", "(0,1]"),
        ("(1,000)", "(1000)"),
        ("1,2", "12"),
        (r"3\mathbf{i}", r"3\mathbf{j}"),
        (r"2\mathrm{e}", "2"),
        ("5x", "5"),
        ("x^2", "x_2"),
        ("x^{12}", "x^12"),
        (r"\text{even}", r"\text{odd}"),
        (r"\sqrt{12}", r"\sqrt12"),
        (r"\sqrt[3]{2}", r"\sqrt{2}"),
        ("x=y=5", "5"),
        ("x>5", "5"),
        ("5", ""),
    ],
)
def test_answers_that_are_not_the_same(one: str, other: str) -> None:
    assert normal_form(one) != normal_form(other)


def test_a_long_or_deep_answer_is_compared_as_it_stands() -> None:
    long = "0.5 " * LONGEST
    assert normal_form(long) == long.strip() == normal_form(f"\n{long}")
    deep, deeper = ("\\sqrt" * n + "{0.5}" for n in (DEEPEST, DEEPEST + 1))
    assert normal_form(deep) == "\\sqrt{" * DEEPEST + "0.5" + "}" * DEEPEST
    assert normal_form(deeper) == deeper


def test_checkers_of_a_users_own_tasks() -> None:
    exact, number, math = (CHECKERS[name] for name in ("exact", "number", "math"))
    assert exact(" Sorted: 1\n2 ", "Sorted: 1 2")
    assert not exact("sorted: 1 2", "Sorted: 1 2")
    assert number("It is 72.", "72")
    assert number(r"3 + 4 = 7, \boxed{7}", "$7.00")
    assert not number("3 + 4 = 7", "7"), "which of the three is meant?"
    assert not number("", "")
    assert math(r"\frac12", "0.5")
    assert math(r"Half, so <answer>$\frac12$</answer>", "1/2")
    assert not math(r"Half, so \frac12", "1/2")


@settings(max_examples=300)
@given(anything, anything)
def test_no_text_makes_a_checker_raise(completion: str, answer: str) -> None:
    for checker in CHECKERS.values():
        assert checker(completion, answer) in (True, False)
    assert answer_math(completion) != ""


@settings(max_examples=1500)
@given(anything)
@example("\\sqrt\\pi{r}")
@example("5.cm.cm")
@example("1 1,\\!1/2")
def test_a_normal_form_is_its_own(text: str) -> None:
    form = normal_form(text)
    assert normal_form(form) == form
    assert same_math(form, text) or answer_math(form) is not None


@settings(max_examples=300)
@given(tex.filter(lambda text: boxed(f"\\boxed{{{text}}}") == text.strip()))
def test_an_answer_in_a_box_equals_itself(text: str) -> None:
    assert same_math(f"So it is \\boxed{{{text}}}.", text) or not text.strip()


@given(st.fractions(max_denominator=10**6), st.sampled_from(["{}/{}", "\\frac{{{}}}{{{}}}", "\\dfrac{{ {} }}{{ {} }}"]))
def test_a_fraction_equals_itself(number: Fraction, spelling: str) -> None:
    text = spelling.format(number.numerator, number.denominator)
    assert answer_number(f"\\boxed{{{text}}}") == number
    assert same_number(f"<answer>{text}</answer>", str(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20, places=4))
def test_a_decimal_equals_itself_with_and_without_separators(number: object) -> None:
    for text in (f"{number:f}", f"{number:,f}", f"${number:,f}."):
        assert equal_numbers(answer_number(f"#### {text}"), Fraction(f"{number:f}"))
    assert normal_form(f"{number:f}") == normal_form(f"{number:,f}0")


@pytest.mark.parametrize(
    "piece",
    [
        *("{", "}", "9", " ", "\n", "-", ".", ".5", "1 ", "1/", "1,234", "$ ", "- $ ", "\\", "\\!", "{,}", "1\\,", "<"),
        *("####", "\\boxed{", "\\boxed ", "\\boxed" + 50 * " ", "<answer>", "</answer>", "\\frac1", "\\text{ "),
    ],
)  # fmt: skip
def test_reading_takes_linear_time(piece: str) -> None:
    """A hundred kilobytes in a moment: were it quadratic, each of these would take minutes."""
    many = piece * (100_000 // len(piece))
    began = time.process_time()
    for text in (many, f"1{many}", f"<answer>{many}</answer>", f"{many}5"):
        for checker in CHECKERS.values():
            checker(text, text)
    assert time.process_time() - began < 10
