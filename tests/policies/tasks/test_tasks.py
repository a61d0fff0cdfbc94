"""Tasks: what is held out stays out, right answers are accepted, nothing raises."""

import random
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from policies.tasks import Problem, Task, get_task, list_tasks, split_of
from policies.tasks.base import HELD_OUT_ONE_IN
from policies.tasks.chain import Chain, equation
from server.training.trainer import task_tokenizer

TASKS = list_tasks()
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@cache
def tokenizer() -> Tokenizer:
    return task_tokenizer()


def test_the_tasks() -> None:
    assert [task.name for task in TASKS] == ["chain", "totals", "sort", "reverse", "sudoku"]
    assert all(get_task(task.name) is task and task.description for task in TASKS)
    with pytest.raises(KeyError, match="unknown task 'nope'; choose from chain, totals, sort, reverse, sudoku"):
        get_task("nope")


@each_task
def test_the_splits_do_not_overlap(task: Task) -> None:
    """By construction: the split is a function of the problem, so no seed can mix them."""
    train, heldout = task.problems(300, 1, "train"), task.problems(300, 2, "heldout")
    assert {split_of(p.key) for p in train} == {"train"}
    assert {split_of(p.key) for p in heldout} == {"heldout"}
    assert not {p.key for p in train} & {p.key for p in heldout}
    assert not {p.prompt for p in train} & {p.prompt for p in heldout}
    assert len({p.key for p in heldout}) == 300, "problems are different from each other"


@each_task
def test_about_one_in_sixteen_problems_is_held_out(task: Task) -> None:
    rng = random.Random(0)
    share = sum(split_of(task.sample(rng).key) == "heldout" for _ in range(2000)) / 2000
    assert abs(share - 1 / HELD_OUT_ONE_IN) < 0.025


def test_free_wording_does_not_change_a_problems_split() -> None:
    """Two stories of the same numbers and changes have the same key, whatever their names and verbs."""
    found: dict[str, set[str]] = {}
    chain, rng = Chain(), random.Random(3)
    chain.steps = (2, 2)
    for _ in range(6000):
        problem = chain.sample(rng)
        found.setdefault(problem.key, set()).add(problem.prompt)
    assert max(len(prompts) for prompts in found.values()) > 1


@each_task
def test_a_seed_gives_the_same_problems(task: Task) -> None:
    assert task.problems(20, 7, "heldout") == task.problems(20, 7, "heldout")
    assert task.problems(20, 7, "heldout") != task.problems(20, 8, "heldout")
    assert task.problems(20, 7, "heldout")[:5] == task.problems(5, 7, "heldout")


def test_more_problems_than_there_are_is_an_error() -> None:
    class Few(Chain):
        name = "few"

        def sample(self, rng: random.Random) -> Problem:
            return Problem("few", str(rng.randint(1, 3)), "p", "a", "r")

    with pytest.raises(ValueError, match="task few has fewer than 50 different train problems"):
        Few().problems(50, 0, "train")


@each_task
def test_right_answers_are_accepted_and_wrong_ones_are_not(task: Task) -> None:
    problems = task.problems(60, 5, "heldout")
    for problem, other in pairwise(problems):
        assert task.check(problem, problem.reference)
        assert task.check(problem, f" {problem.reference}\n")
        solutions = task.solutions(problem)
        assert problem.reference in solutions
        assert all(task.check(problem, solution) for solution in solutions)
        assert not task.check(problem, "")
        assert not task.check(problem, problem.prompt) or problem.answer in problem.prompt, "a list that was in order"
        assert not task.check(problem, problem.reference[: -len(problem.reference) // 3])
        wrong = [digit for digit in "0123456789" if digit != problem.reference.rstrip(".")[-1]]
        assert not any(task.check(problem, problem.reference.rstrip(".")[:-1] + digit) for digit in wrong)
        if other.answer != problem.answer and task.name != "sudoku":
            assert not task.check(problem, other.reference)


@each_task
@settings(max_examples=150)
@given(data=st.data())
def test_no_text_makes_a_check_raise(task: Task, data: st.DataObject) -> None:
    problem = task.draw(random.Random(data.draw(st.integers(0, 50))), "train")
    text = data.draw(
        st.one_of(
            st.text(),
            st.text(st.sampled_from("0123456789 #:\n_.١²")),
            st.text(max_size=5).map(lambda extra: problem.reference + extra),
        )
    )
    assert task.check(problem, text) in (True, False)


def test_sudoku_accepts_any_valid_completion_and_keeps_the_clues() -> None:
    task = get_task("sudoku")
    several = 0
    for problem in task.problems(200, 0, "train"):
        solutions = task.solutions(problem)
        several += len(solutions) > 1
        clues = problem.prompt.partition(":")[2].split()
        for solution in solutions:
            cells = solution.partition(":")[2].split()
            assert all(clue in ("_", cell) for clue, cell in zip(clues, cells, strict=True))
            squares = [
                *[set(cells[i : i + 4]) for i in range(0, 16, 4)],
                *[set(cells[i::4]) for i in range(4)],
                *[{cells[i], cells[i + 1], cells[i + 4], cells[i + 5]} for i in (0, 2, 8, 10)],
            ]
            assert all(square == set("1234") for square in squares)
    assert several > 20, "some problems have several answers"


def test_chain_references_compute_what_they_say() -> None:
    for problem in get_task("chain").problems(300, 4, "train"):
        lines = [part for part in problem.reference.replace(" and ", " . ").split(".") if "=" in part]
        for line in lines:
            words = line.split()
            at = words.index("=")
            a, sign, b, result = int(words[at - 3]), words[at - 2], int(words[at - 1]), int(words[at + 1])
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign] == result
            assert 1 <= result <= 99
        assert problem.reference.endswith(f"#### {problem.answer}")


def test_equations_are_right() -> None:
    rng = random.Random(0)
    for _ in range(500):
        a, sign, b, _, result = (text.strip() for text, _ in equation(rng)[:5])
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / int(b)}[sign] == int(
            result
        )


@each_task
def test_every_response_fits_the_tasks_length(task: Task) -> None:
    for split in ("train", "heldout"):
        for problem in task.problems(400, 9, split):  # type: ignore[arg-type]
            for solution in task.solutions(problem)[:3]:
                used = len(tokenizer().encode(solution).ids) + 1
                assert used <= task.gen_length, f"{used} tokens with end-of-text"


def test_each_piece_of_a_chain_is_one_token() -> None:
    rng, chain = random.Random(5), Chain()
    for _ in range(100):
        problem, pieces = chain.sample_worked(rng)
        ids = tokenizer().encode(problem.reference).ids
        assert [tokenizer().decode([id]) for id in ids] == [text for text, _ in pieces]


@each_task
def test_interchangeable_words_are_single_tokens_and_do_not_matter(task: Task) -> None:
    for group in task.interchangeable():
        assert len(group) > 1
        assert {len(tokenizer().encode(word).ids) for word in group} == {1}
    problem = task.draw(random.Random(1), "train")
    for group in task.interchangeable():
        for word in group:
            for other in group:
                assert task.check(problem, problem.reference.replace(word, other))


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    ids = tokenizer().encode(text).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["", "\r\n\t\v", "é\u0301\ufeff", "a\x00b", "😀👩‍👩‍👧", "٣ ½ 10²", "Tom  has 100 apples", "\u2028"]
)
def test_texts_that_tokenizers_stumble_over(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids) == text
