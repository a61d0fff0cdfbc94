"""Tasks from files: GSM8K, MATH, a user's own, and those that a distribution adds."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.tasks import GSM8K, MATH, PromptFile, Split, Task, UnknownTaskError, embedded_tasks, get_task, list_tasks
from policies.tasks.base import HELD_OUT_ONE_IN, split_of
from tests.commands.application import read_json, refused, right
from tests.installed import Installed

Record = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes records as JSON lines."""

    def written(records: list[Record], name: str = "problems.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return written


def gsm8k(numbers: range) -> list[Record]:
    question, answer = "Tom has {n} apples.  He buys 5. How many now?", "{n} + 5 = <<{n}+5={m}>>{m}.\n#### {m:,}"
    return [{"question": question.format(n=n), "answer": answer.format(n=n, m=n + 5)} for n in numbers]


def math(numbers: range) -> list[Record]:
    return [
        {"problem": f"What is ${n}/7$?", "level": "Level 1", "solution": f"It is $\\boxed{{\\dfrac{{{n}}}{{7}}}}$."}
        for n in numbers
    ]


def prompts(numbers: range) -> list[Record]:
    return [{"prompt": f"{n} + 1 =", "answer": n + 1} for n in numbers]


def keys(task: Task, count: int, split: Split) -> set[str]:
    return {problem.key for problem in task.problems(count, 0, split)}


def test_gsm8k(write: Write) -> None:
    task = GSM8K(train=str(write(gsm8k(range(900, 1000)))))
    assert re.fullmatch(r"gsm8k-[0-9a-f]{8}", task.name)
    assert task.gen_length == 256
    problem = next(p for p in task.problems(100, 0, "train") if p.answer == "1,001")
    assert problem.prompt.endswith("\n\nProblem: Tom has 996 apples.  He buys 5. How many now?\n\n<reasoning>")
    assert r"\boxed{}" in problem.prompt
    assert problem.reference == "\n996 + 5 = 1001.\n</reasoning>\n<answer>\n\\boxed{1,001}\n</answer>"
    assert problem.task == task.name
    for right_one in (problem.reference, r"\boxed{1001}", "<answer>$1,001.00</answer>", "#### 1001"):
        assert task.check(problem, right_one)
    for wrong_one in ("", problem.prompt, r"\boxed{1002}", "1001", r"\boxed{1,001", r"\boxed{1001} \boxed{7}"):
        assert not task.check(problem, wrong_one)


def test_math(write: Write) -> None:
    task = MATH(str(write([*math(range(1, 100)), {"problem": "Half?", "answer": "$0.5$", "solution": "So."}])))
    assert re.fullmatch(r"math-[0-9a-f]{8}", task.name)
    problems = [*task.problems(50, 0, "train"), *task.problems(2, 0, "heldout")]
    assert all(task.check(problem, problem.reference) for problem in problems)
    problem = next(p for p in problems if "Half" not in p.prompt)
    number = problem.answer.removeprefix("\\dfrac{").partition("}")[0]
    assert problem.prompt.endswith(f"\n\nProblem: What is ${number}/7$?\n\n<reasoning>")
    assert task.check(problem, f"$\\boxed{{x = {number}/7}}$")
    assert not task.check(problem, f"{number}/7")
    assert not task.check(problem, r"\boxed{}")
    half = MATH(heldout=str(write([{"problem": "Half?", "answer": "$0.5$"}]))).problems(1, 0, "heldout")[0]
    assert half.answer == "$0.5$"
    assert task.check(half, half.reference)
    assert task.check(half, r"<answer>\frac12</answer>")


def test_math_as_a_folder_of_files(tmp_path: Path) -> None:
    """The authors' edition: a file a problem in folders for subjects, under `train` and `test`."""
    records = math(range(1, 111))
    for i, record in enumerate(records):
        folder = tmp_path / "MATH" / ("train" if i < 100 else "test") / f"subject{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.json").write_text(json.dumps(record, indent=1))
    (tmp_path / "MATH" / "train" / "._0.json").write_text("what an archiver leaves behind")
    (tmp_path / "MATH" / "README.txt").write_text("no problem")
    task = MATH(str(tmp_path / "MATH"))
    questions = [" ".join(record["problem"].split()) for record in records]
    assert keys(task, 100, "train") == set(questions[:100])
    assert keys(task, 10, "heldout") == set(questions[100:])
    train = MATH(str(tmp_path / "MATH" / "train"))
    assert {split_of(key) for key in keys(train, 1, "heldout")} == {"heldout"}, "a folder without a split is split"
    both = MATH(train=str(tmp_path / "MATH" / "train"), heldout=str(tmp_path / "MATH" / "test"))
    assert both.name == task.name, "the same problems in the same splits"
    (tmp_path / "MATH" / "train" / "subject1" / "bad.json").write_text('{"problem": "?",\n "solution": 5,}')
    with pytest.raises(ValueError, match=r"subject1/bad\.json: Invalid JSON: .* at line 2 column"):
        MATH(str(tmp_path / "MATH"))


def test_a_users_own_prompts(write: Write) -> None:
    file = write(prompts(range(100)), "my riddles, hard.jsonl")
    task = PromptFile(str(file), checker="number")
    assert re.fullmatch(r"my-riddles-hard-[0-9a-f]{8}", task.name)
    problem = task.problems(1, 0, "train")[0]
    number = int(problem.answer)
    assert problem.prompt == f"{number - 1} + 1 =", "nothing is added to the prompt"
    assert problem.reference == problem.answer
    assert task.check(problem, f" {number}.0\n")
    assert not PromptFile(str(file)).check(problem, f"{number}.0")
    assert PromptFile(str(file), checker="math").check(problem, f"\\boxed{{{number}}}")
    assert len({PromptFile(str(file), checker=name).name for name in ("exact", "number", "math")}) == 3
    longer = write([{"prompt": "Two?", "answer": "2", "reference": "1 + 1, so #### 2"}])
    assert PromptFile(train=str(longer), checker="number").problems(1, 0, "train")[0].reference == "1 + 1, so #### 2"


def test_one_file_is_split_by_the_rule_of_all_tasks(write: Write) -> None:
    records = prompts(range(1600))
    task = PromptFile(str(write(records)))
    expected: dict[Split, set[str]] = {"train": set(), "heldout": set()}
    for record in records:
        expected[split_of(record["prompt"])].add(record["prompt"])
    assert abs(len(expected["heldout"]) - 1600 / HELD_OUT_ONE_IN) < 40
    for split, there in expected.items():
        assert keys(task, len(there), split) == there
        with pytest.raises(ValueError, match=f"has {len(there)} {split} problems, not {len(there) + 1}"):
            task.problems(len(there) + 1, 0, split)
    rng = random.Random(0)
    assert {split_of(task.draw(rng, "heldout").key) for _ in range(200)} == {"heldout"}
    assert {split_of(task.draw(rng, "train").key) for _ in range(200)} == {"train"}
    assert {split_of(task.sample(rng).key) for _ in range(200)} == {"train", "heldout"}


def test_what_is_in_both_files_is_held_out(write: Write) -> None:
    train = write([*gsm8k(range(50)), *gsm8k(range(5))], "train.jsonl")
    other = [record | {"question": record["question"].replace("  ", "\n")} for record in gsm8k(range(40, 60))]
    heldout = write(other, "test.jsonl")
    task = GSM8K(train=str(train), heldout=str(heldout))
    taught, kept = keys(task, 40, "train"), keys(task, 20, "heldout")
    assert len(taught) == 40
    assert len(kept) == 20
    assert not taught & kept
    with pytest.raises(ValueError, match="has 40 train problems, not 41"):
        task.problems(41, 0, "train")
    alone = GSM8K(heldout=str(heldout))
    assert keys(alone, 20, "heldout") == kept
    assert alone.name != task.name
    with pytest.raises(ValueError, match="has 0 train problems, not 1"):
        alone.draw(random.Random(0), "train")


def test_a_seed_gives_the_same_problems(write: Write) -> None:
    first, again = (PromptFile(str(write(prompts(range(400))))) for _ in range(2))
    assert first.name == again.name
    assert first.problems(20, 7, "train") == again.problems(20, 7, "train")
    assert first.problems(20, 7, "train") != first.problems(20, 8, "train")
    assert first.problems(20, 7, "train")[:5] == first.problems(5, 7, "train")
    assert PromptFile(str(write(prompts(range(399))))).name != first.name


@pytest.fixture(scope="module")
def apples(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("gsm8k") / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in gsm8k(range(3))))
    return GSM8K(train=str(path))


@given(text=st.text())
def test_no_text_makes_a_check_raise(apples: Task, text: str) -> None:
    for problem in apples.problems(3, 0, "train"):
        assert apples.check(problem, text) in (True, False)
        assert apples.check(problem, text + problem.reference)


GOOD = {"question": "q", "answer": "#### 3", "problem": "q", "solution": r"\boxed{3}", "prompt": "q"}


@pytest.mark.parametrize(
    ("kind", "line", "why"),
    [
        (GSM8K, "[1]", "Input should be an object"),
        (GSM8K, "null", "Input should be an object"),
        (GSM8K, '{"question": "q"', "Invalid JSON: EOF while parsing an object at column 16"),
        (GSM8K, "[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        (GSM8K, '{"question": "\\ud800", "answer": "#### 1"}', "Invalid JSON: "),
        (GSM8K, '{"answer": "#### 1"}', "question: Field required"),
        (GSM8K, '{"question": " ", "answer": "#### 1"}', "question: is empty"),
        (GSM8K, '{"question": ["q"], "answer": "#### 1"}', "question: Input should be a valid string"),
        (GSM8K, '{"question": "q"}', "answer: Field required"),
        (GSM8K, '{"question": "q", "answer": null}', "answer: Input should be a valid string"),
        (GSM8K, '{"question": "q", "answer": "3"}', "answer: does not end in '#### NUMBER'"),
        (GSM8K, '{"question": "q", "answer": "3 #### three"}', "answer: does not end in '#### NUMBER'"),
        (MATH, '{"solution": "\\\\boxed{3}"}', "problem: Field required"),
        (MATH, '{"problem": "q", "solution": "3"}', r"solution: has no \boxed{} with an answer"),
        (MATH, '{"problem": "q"}', r"solution: has no \boxed{} with an answer"),
        (MATH, '{"problem": "q", "answer": ""}', "answer: is empty"),
        (MATH, '{"problem": "q", "answer": "{3"}', "answer: has braces without a partner"),
        (PromptFile, '{"answer": "3"}', "prompt: Field required"),
        (PromptFile, '{"prompt": "q", "answer": true}', "answer: Input should be a valid string"),
        (PromptFile, '{"prompt": "q", "answer": "3", "reference": "4"}', "reference: checker 'exact' does not take it"),
    ],
)
def test_a_malformed_line_is_named(write: Write, kind: type[GSM8K | MATH | PromptFile], line: str, why: str) -> None:
    good = GOOD | ({"answer": "3"} if kind is PromptFile else {})
    path = write([good])
    path.write_text(f"{path.read_text()}\n{line}\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{path}, line 3: {why}')}") as caught:
        kind(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_problems(write: Write, tmp_path: Path) -> None:
    for path, why in [
        (write([]), "has no problems"),
        (tmp_path / "none.jsonl", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "a device, not a file"),
    ]:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: {why}"):
            GSM8K(str(path))
    with pytest.raises(ValueError, match="has no problems"):
        MATH(heldout=str(tmp_path))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "café", "answer": "3"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: Invalid JSON: invalid unicode"):
        PromptFile(str(latin))
    with pytest.raises(ValueError, match="checker 'number' does not take it for a right response"):
        PromptFile(str(write([{"prompt": "q", "answer": "three"}])), checker="number")


def test_files_of_other_systems(write: Write, tmp_path: Path) -> None:
    """A byte order mark, CRLF, blank lines, fields of other programs, no line break at the end."""
    path = tmp_path / "other.jsonl"
    lines = "\r\n\r\n".join(json.dumps(record | {"id": 3}) for record in prompts(range(3)))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert PromptFile(str(path)).name.rpartition("-")[2] == PromptFile(str(write(prompts(range(3))))).name[-8:]


def test_specs(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    train, heldout = write(gsm8k(range(9)), "a,b=c.jsonl"), write(gsm8k(range(9, 20)), "test.jsonl")
    text = f"gsm8k:train={train},heldout={heldout}"
    assert get_task(text).name == GSM8K(train=str(train), heldout=str(heldout)).name
    assert get_task(text) is get_task(text), "files are read once"
    monkeypatch.setenv("HOME", str(train.parent))
    assert get_task("gsm8k:heldout=~/test.jsonl").name == GSM8K(heldout=str(heldout)).name
    file = write(prompts(range(50)))
    assert get_task(f"file:path={file},checker=number").name == PromptFile(str(file), checker="number").name
    assert get_task(f"math:path={write(math(range(50)))}").name.startswith("math-")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gsm8k", "gsm8k needs either path=FILE, or train=FILE and heldout=FILE or one of them"),
        ("gsm8k:", "gsm8k needs either"),
        ("gsm8k:path=a,train=b", "gsm8k needs either"),
        ("file:checker=exact", "file needs either"),
        ("gsm8k:a.jsonl", "gsm8k: 'a.jsonl' is not option=value with an option of path, train, heldout"),
        ("gsm8k:path=", "gsm8k: 'path=' is not option=value"),
        ("gsm8k:checker=number", "gsm8k: 'checker=number' is not option=value"),
        ("gsm8k:path=a,path=b", "gsm8k: path is given twice"),
        ("gsm8k:path=/nowhere/a.jsonl", "/nowhere/a.jsonl: No such file or directory"),
        ("file:path=a,checker=best", "unknown checker 'best'; choose from exact, number, math"),
        ("chain:path=a", "task chain takes no options, so not 'path=a'"),
        ("gsm8k:path=~nobody-of-that-name/a", "~nobody-of-that-name/a: Could not determine home directory"),
        ("riddles:path=a", "unknown task 'riddles'; choose from chain, totals, sort, reverse, sudoku; or gsm8k:path="),
    ],
)
def test_specs_that_are_wrong_use(text: str, why: str) -> None:
    with pytest.raises((ValueError, UnknownTaskError)) as caught:
        get_task(text)
    assert str(caught.value).startswith(why)
    for command in ("sample", "evaluate"):
        said = refused(2, *(("tasks", "sample") if command == "sample" else ("evaluate",)), "--task", text)
        assert "--task" in said
        assert " ".join(why.split()) in said


def test_commands_take_files(write: Write, tiny_model: Path, tmp_path: Path) -> None:
    file = write(prompts(range(300)))
    spec = f"file:path={file},checker=number"
    name = PromptFile(str(file), checker="number").name
    lines = [json.loads(line) for line in right("tasks", "sample", "--task", spec, "--count", 3).stdout.splitlines()]
    assert [set(line) for line in lines] == [{"task", "prompt", "answer", "reference"}] * 3
    assert {line["task"] for line in lines} == {name}
    assert "has 0 train problems" in refused(2, "tasks", "sample", "--task", f"file:heldout={file}", "--split", "train")
    rows = tmp_path / "rows.json"
    arguments = ("--sampler", "oracle", "--count", 3, "--gen-length", 4, "--json", rows)
    right("evaluate", "--model", tiny_model, "--task", spec, "--task", spec, *arguments)
    assert [(row["task"], row["count"]) for row in read_json(rows)["rows"]] == [(name, 3)]
    file.write_text("{}")
    broken = f"{spec},heldout={file}".replace("path=", "train=")
    assert f"{file}, line 1: prompt: Field required" in refused(2, "evaluate", "--model", tiny_model, "--task", broken)
    assert "gsm8k:path=FILE" in right("tasks", "list").stdout


PLUGIN = """
from policies.tasks import Problem, Task

class Echo(Task):
    name = {name!r}
    description = "say it again"
    gen_length = 8
    def sample(self, rng):
        number = str(rng.randrange(10**6))
        return Problem(self.name, number, "Say " + number, number, number)
    def check(self, problem, completion):
        return completion.strip() == problem.answer

not_a_class = Echo()
"""


def test_an_entry_point_adds_a_task(installed: Installed) -> None:
    embedded = [task.name for task in embedded_tasks()]
    installed.add("third_party", PLUGIN.format(name="echo"), "unmask.tasks", echo="Echo")
    assert [task.name for task in list_tasks()] == [*embedded, "echo"]
    assert [task.name for task in embedded_tasks()] == embedded
    task = get_task("echo")
    assert all(task.check(problem, problem.reference) for problem in task.problems(5, 0, "heldout"))
    assert "say it again" in right("tasks", "list").stdout
    assert json.loads(right("tasks", "sample", "--task", "echo", "--count", 1).stdout)["task"] == "echo"
    assert "choose from chain, totals, sort, reverse, sudoku, echo; or" in refused(2, "evaluate", "--task", "nope")


@pytest.mark.parametrize(
    ("entry", "name", "attribute", "why"),
    [
        ("echo", "echo", "not_a_class", "third_party:not_a_class is not a Task class"),
        ("echo", "echo", "Nothing", "has no attribute 'Nothing'"),
        ("echo", "shout", "Echo", "has the name 'shout', not the entry point's"),
        ("chain", "chain", "Echo", "the name is already in use"),
        ("gsm8k", "gsm8k", "Echo", "the name is already in use"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_skipped(
    installed: Installed, caplog: pytest.LogCaptureFixture, entry: str, name: str, attribute: str, why: str
) -> None:
    installed.add("third_party", PLUGIN.format(name=name), "unmask.tasks", **{entry: attribute})
    assert list_tasks() == list(embedded_tasks())
    assert len(caplog.records) == 1
    assert f"unmask.tasks '{entry}' of third_party 1.0 is skipped" in caplog.text and why in caplog.text
    if entry == "echo":
        assert why in refused(2, "tasks", "sample", "--task", "echo").replace("│ ", "")
