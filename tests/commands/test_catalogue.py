import json
import subprocess
import sys

import pytest

from policies.tasks import get_task, list_tasks
from samplers import list_samplers
from tests.commands.application import refused, right


def test_every_sampler_is_listed_with_its_paper() -> None:
    shown = right("samplers").stdout
    for sampler in list_samplers():
        assert sampler.name in shown
        assert sampler.paper in shown


def test_one_sampler_with_its_parameters() -> None:
    shown = right("samplers", "threshold").stdout
    assert "commit candidates with confidence >= this" in shown
    assert "0.9" in shown
    assert "number > 0, <= 1" in shown
    assert "integer >= 1, <= 1000000" in right("samplers", "topk").stdout


def test_an_unknown_sampler_is_wrong_use() -> None:
    assert "unknown sampler 'best'; choose from random, sequential, topk" in refused(2, "samplers", "best")


def test_tasks_are_listed() -> None:
    shown = right("tasks", "list").stdout
    for task in list_tasks():
        assert task.name in shown
        assert task.description in shown


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_problems_as_json_lines(split: str) -> None:
    arguments = ("tasks", "sample", "--task", "sudoku", "--count", 3, "--seed", 7, "--split", split)
    lines = [json.loads(line) for line in right(*arguments).stdout.splitlines()]
    expected = get_task("sudoku").problems(3, 7, split)  # type: ignore[arg-type]
    assert [set(line) for line in lines] == [{"task", "prompt", "answer", "reference"}] * 3
    assert [(line["prompt"], line["reference"]) for line in lines] == [(p.prompt, p.reference) for p in expected]
    assert right(*arguments).stdout.splitlines() == [json.dumps(line) for line in lines]


@pytest.mark.parametrize(
    ("flag", "value"), [("--task", "riddles"), ("--split", "validation"), ("--count", 0), ("--seed", "x")]
)
def test_wrong_flags_are_named(flag: str, value: object) -> None:
    arguments = {"--task": "sort"} | {flag: value}
    assert flag in refused(2, "tasks", "sample", *(part for pair in arguments.items() for part in pair))


def test_help_and_problems_come_without_torch() -> None:
    code = (
        "import sys\n"
        "from tests.commands.application import app\n"
        "for arguments in (['--help'], ['evaluate', '--help'], ['tasks', 'sample', '--task', 'sort']):\n"
        "    try:\n"
        "        app(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Sort these numbers: " in done.stdout
