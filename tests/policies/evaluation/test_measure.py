import pytest

from policies.evaluation.measure import FRONTIER, Measurement, Trial, TrialError, evaluate
from policies.evaluation.sampler_spec import SamplerSpec
from policies.tasks import get_task
from policies.tasks.lists import Totals
from samplers import Canvas, ParameterError, UnknownSamplerError
from tests.policies.fake import FakeModel, hazy, held_out, right

REVERSE = get_task("reverse")
COUNT = 6
PROBLEMS = held_out(REVERSE, COUNT)
LENGTHS = [len(problem.answer.split()) + 3 for problem in PROBLEMS]
"""Tokens that count: `Reversed`, `:`, the numbers, end-of-text."""


def run(sampler: str, model: FakeModel, batch: int = 4, **changes: object) -> Measurement:
    settings: dict[str, object] = {"block_length": None, "gen_length": REVERSE.gen_length, "count": COUNT} | changes
    return evaluate(model.subject(), Trial(REVERSE, SamplerSpec.parse(sampler), **settings), batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampler", "block_length", "per_forward"),
    [
        ("topk:k=1", None, 1),
        ("topk:k=2", None, 2),
        ("topk:k=1000", None, 16),
        ("topk:k=1000", 4, 4),
        ("threshold:threshold=0.9", None, 16),
        ("threshold:threshold=0.96", None, 1),
        ("threshold:threshold=0.9", 5, 5),
        ("oracle", None, 16),
        ("oracle", 5, 5),
    ],
)
def test_counts_of_a_model_that_knows_the_answer(sampler: str, block_length: int | None, per_forward: int) -> None:
    row = run(sampler, FakeModel(REVERSE, PROBLEMS, right), block_length=block_length)
    forwards = sum(-(-length // per_forward) for length in LENGTHS)
    assert (row.correct, row.accuracy, row.accuracy_high) == (COUNT, 1.0, 1.0)
    assert (row.tokens, row.forwards) == (sum(LENGTHS), forwards)
    assert row.tpf == sum(LENGTHS) / forwards
    assert row.accuracy_low == pytest.approx(0.6097, abs=1e-4)


def test_padding_is_filled_or_denoised() -> None:
    def end_first(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        end = reference.index(1)
        return reference[position], 0.9 - 0.01 * abs(position - end) - (0.2 if position < end else 0.0)

    def forwards(fill_after_end: bool) -> tuple[int, int, int]:
        row = run("topk", FakeModel(REVERSE, PROBLEMS, end_first), fill_after_end=fill_after_end)
        return row.correct, row.tokens, row.forwards

    assert forwards(True) == (COUNT, sum(LENGTHS), sum(LENGTHS))
    assert forwards(False) == (COUNT, sum(LENGTHS), COUNT * REVERSE.gen_length)


def test_wrong_completions_do_not_count_as_correct() -> None:
    wrong_prompt = FakeModel(REVERSE, PROBLEMS, right).text.encode(PROBLEMS[2].prompt)

    def one_wrong(canvas: Canvas, position: int, reference: list[int]) -> tuple[int, float]:
        spoiled = position == 3 and canvas.tokens[: len(wrong_prompt)].tolist() == wrong_prompt
        return reference[position - spoiled], 0.9

    row = run("topk:k=4", FakeModel(REVERSE, PROBLEMS, one_wrong))
    assert (row.correct, row.accuracy) == (COUNT - 1, (COUNT - 1) / COUNT)


@pytest.mark.parametrize("sampler", ["random", "topk:k=3", "threshold:threshold=0.6", "oracle"])
def test_results_do_not_depend_on_the_batch(sampler: str) -> None:
    alone, together = (run(sampler, FakeModel(REVERSE, PROBLEMS, hazy), batch) for batch in (1, 4))
    assert alone.model_copy(update={"seconds": 0.0}) == together.model_copy(update={"seconds": 0.0})
    assert 0 < alone.forwards < alone.tokens or sampler == "random"


def test_the_batch_stays_full_and_rows_of_a_forward_are_of_like_length() -> None:
    model = FakeModel(REVERSE, PROBLEMS, right)
    run("topk:k=1", model, batch=2)
    sizes = [len(rows) for rows in model.rows]
    assert set(sizes) == {1, 2}
    assert sizes == sorted(sizes, reverse=True), "a place stays empty only when nothing is waiting"
    longest = [max(rows) for rows in model.rows]
    assert longest == sorted(longest) and longest[0] < longest[-1]


def test_seeds_choose_problems_and_random_order() -> None:
    def first_rows(seed: int) -> Measurement:
        problems = held_out(REVERSE, COUNT, seed)
        return run("random", FakeModel(REVERSE, problems, hazy), seed=seed).model_copy(update={"seconds": 0.0})

    assert first_rows(1) == first_rows(1)
    assert (first_rows(1).tokens, first_rows(1).forwards) != (first_rows(2).tokens, first_rows(2).forwards)


def test_every_solved_problem_is_reported() -> None:
    seen: list[None] = []
    trial = Trial(REVERSE, SamplerSpec.parse("topk:k=8"), 8, 16, COUNT)
    evaluate(FakeModel(REVERSE, PROBLEMS, right).subject(), trial, 2, lambda: seen.append(None))
    assert len(seen) == COUNT


def test_a_trial_that_cannot_be_run_is_refused() -> None:
    model = FakeModel(REVERSE, PROBLEMS, right)
    with pytest.raises(TrialError, match="more than the model's 20"):
        evaluate(model.subject(max_length=20), Trial(REVERSE, SamplerSpec.parse("topk"), None, 16, COUNT), 4)

    class Few(Totals):
        name = "few"
        size = (2, 2)

    with pytest.raises(TrialError, match="fewer than 20"):
        evaluate(model.subject(), Trial(Few(), SamplerSpec.parse("topk"), None, 16, 20), 4)
    with pytest.raises(ParameterError, match="raise steps"):
        Trial(REVERSE, SamplerSpec.parse("topk:steps=1"), 8, 16, COUNT)


def test_specs() -> None:
    spec = SamplerSpec.parse("threshold:threshold=0.75")
    assert (spec.name, spec.stated()) == ("threshold", {"threshold": 0.75})
    assert SamplerSpec.parse("topk:steps=4").stated() == {"steps": 4}
    assert [SamplerSpec.parse(text).name for text in FRONTIER].count("threshold") == 7
    around = SamplerSpec.parse("threshold:threshold=1e+0+guidance:scale=1.5+credit").modifiers
    assert [(each.name, each.stated()["scale" if each.name == "guidance" else "alpha"]) for each in around] == [
        ("guidance", 1.5),
        ("credit", 0.7),
    ]
    with pytest.raises(UnknownSamplerError, match="choose from random, sequential, topk"):
        SamplerSpec.parse("best")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("topk:k", "is not name:param=value"),
        ("topk:", "is not name:param=value"),
        ("topk:k=1,k=2", "is not name:param=value"),
        ("topk:k=0", "topk: k: Input should be greater"),
        ("topk:k=two", "topk: k: Input should be a valid integer"),
        ("topk:k=1,steps=2", "not both"),
        ("oracle:k=1", "oracle: k: Extra inputs"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        SamplerSpec.parse(text)
