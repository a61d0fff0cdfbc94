import random

from policies.evaluation.measure import Measurement, Trial, evaluate
from policies.evaluation.sampler_spec import SamplerSpec
from policies.tasks import Task, get_task
from samplers import Canvas
from tests.policies.fake import END_ID, Answer, FakeModel, held_out

COUNT = 5


def run(task: Task, answer: Answer) -> Measurement:
    trial = Trial(task, SamplerSpec.parse("oracle"), None, task.gen_length, COUNT)
    return evaluate(FakeModel(task, held_out(task, COUNT), answer).subject(), trial, COUNT)


def test_it_commits_what_is_right_and_nothing_else() -> None:
    def knows_the_next(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        known = position == 0 or not canvas.masked[position - 1]
        return (reference[position], 0.1) if known else (END_ID if reference[position] != END_ID else 50, 0.9)

    row = run(get_task("totals"), knows_the_next)
    assert (row.correct, row.tpf) == (COUNT, 1.0), (
        "one position a forward, the unsure right one before the sure wrong ones"
    )


def test_free_words_may_stand_for_each_other() -> None:
    task = get_task("chain")
    model = FakeModel(task, held_out(task, COUNT), lambda *_: (0, 0.0))
    groups = [[token for word in group for token in model.text.encode(word)] for group in task.interchangeable()]
    other = {token: group[(i + 1) % len(group)] for group in groups for i, token in enumerate(group)}

    def says_it_otherwise(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        return other.get(reference[position], reference[position]), 0.5

    row = run(task, says_it_otherwise)
    assert (row.correct, row.forwards) == (COUNT, COUNT)


def test_a_wrong_word_of_another_group_is_not_right() -> None:
    task = get_task("chain")
    model = FakeModel(task, held_out(task, COUNT), lambda *_: (0, 0.0))
    first = {token for word in task.interchangeable()[0] for token in model.text.encode(word)}
    link = model.text.encode(task.interchangeable()[1][0])[0]

    def starts_with_a_link(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        return (link, 0.5) if reference[position] in first else (reference[position], 0.4)

    assert run(task, starts_with_a_link).forwards == 2 * COUNT, (
        "all the rest first, the wrong word when nothing else is left"
    )


def test_any_solution_is_right_and_it_keeps_to_one() -> None:
    task = get_task("sudoku")
    problems = held_out(task, COUNT)
    model = FakeModel(task, problems, lambda *_: (0, 0.0))
    solutions = {
        tuple(model.padded(problem.reference)): [model.padded(text) for text in task.solutions(problem)]
        for problem in problems
    }
    assert max(map(len, solutions.values())) > 1

    def last_solution(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        return solutions[tuple(reference)][-1][position], 0.5

    row = run(task, last_solution)
    assert (row.correct, row.forwards) == (COUNT, COUNT)

    def two_at_once(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        """A mixture of two solutions; once something is committed, the first solution that still fits."""
        first, last = solutions[tuple(reference)][0], solutions[tuple(reference)][-1]
        if bool(canvas.masked.all()):
            return random.Random(position).choice((first, last))[position], 0.5
        known = [(i, t) for i, t in enumerate(canvas.generated.tolist()) if not canvas.masked[i]]
        fitting = [s for s in solutions[tuple(reference)] if all(s[i] == t for i, t in known)]
        return fitting[0][position], 0.5

    row = run(task, two_at_once)
    assert row.correct == COUNT, "never a mixture of solutions"
    assert row.forwards > COUNT


def test_a_model_that_knows_nothing_comes_to_an_end() -> None:
    def nonsense(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        return 60 if reference[position] != 60 else 61, 0.5

    row = run(get_task("sudoku"), nonsense)
    assert (row.correct, row.tpf) == (0, 1.0)
