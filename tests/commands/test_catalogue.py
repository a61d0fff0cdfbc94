import json
import subprocess
import sys
from pathlib import Path

import pytest

from policies.tasks import get_task, list_tasks
from samplers import list_modifiers, list_samplers
from tests.commands.application import refused, right
from tests.installed import SAMPLER, Installed


def test_every_sampler_is_listed_with_its_paper() -> None:
    shown = right("samplers").stdout
    for listed in (*list_samplers(), *list_modifiers()):
        assert listed.name in shown
        assert listed.paper in shown


def test_one_sampler_with_its_parameters() -> None:
    shown = right("samplers", "threshold").stdout
    assert "commit candidates with confidence >= this" in shown
    assert "0.9" in shown
    assert "number > 0, <= 1" in shown
    assert "integer >= 1, <= 1000000" in right("samplers", "topk").stdout


def test_a_modifier_with_its_parameters() -> None:
    shown = right("samplers", "guidance").stdout
    assert shown.startswith("guidance (modifier)")
    assert "number >= 0, <= 100" in shown and "string or array" in shown
    both = json.loads(right("samplers", "credit", "--json").stdout)
    assert [(entry["id"], entry["kind"]) for entry in both] == [("credit", "sampler"), ("credit", "modifier")]
    assert "credit (modifier)" in right("samplers", "credit").stdout


def test_an_unknown_sampler_is_wrong_use() -> None:
    assert "modifiers are guidance, credit, spacing" in refused(2, "samplers", "best")
    assert "unknown sampler 'best'; choose from random, sequential, topk" in refused(2, "samplers", "best")


def test_samplers_as_json() -> None:
    found = json.loads(right("samplers", "--json").stdout)
    ids = {kind: [entry["id"] for entry in found if entry["kind"] == kind] for kind in ("sampler", "modifier")}
    assert ids["sampler"] == [sampler.name for sampler in list_samplers()]
    assert ids["modifier"] == [modifier.name for modifier in list_modifiers()]
    assert len(found) == sum(map(len, ids.values()))
    assert {frozenset(entry) for entry in found} == {frozenset({"id", "kind", "available", "reason", "parameters"})}
    assert {(entry["available"], entry["reason"]) for entry in found} == {(True, None)}
    (threshold,) = json.loads(right("samplers", "threshold", "--json").stdout)
    assert threshold["id"] == "threshold" and threshold["parameters"]["properties"]["threshold"]["default"] == 0.9
    assert "unknown sampler 'best'" in refused(2, "samplers", "best", "--json")


def test_a_plugin_that_cannot_be_loaded_is_listed_with_the_reason(installed: Installed, tiny_model: Path) -> None:
    installed.sampler("import nothing_like_it")
    reason = "ModuleNotFoundError: No module named 'nothing_like_it'"
    shown = " ".join(right("samplers", "left_to_right").stdout.split())
    assert shown == f"left_to_right of third_party 1.0 could not be loaded: {reason}"
    everything = right("samplers").stdout
    assert "left_to_right" in everything and "threshold" in everything
    found = json.loads(right("samplers", "--json").stdout)
    *ours, broken = [entry for entry in found if entry["kind"] == "sampler"]
    assert all(entry["available"] for entry in ours)
    assert broken == {
        "id": "left_to_right",
        "kind": "sampler",
        "available": False,
        "reason": f"third_party 1.0: {reason}",
        "parameters": {},
    }
    assert json.loads(right("samplers", "left_to_right", "--json").stdout) == [broken]
    assert right("generate", "a", "--model", tiny_model, "--max-tokens", 4).stdout
    assert reason in refused(2, "generate", "a", "--model", tiny_model, "--sampler", "left_to_right")
    assert reason in refused(2, "evaluate", "--model", tiny_model, "--sampler", "left_to_right")


def test_where_a_sampler_failed_is_shown(installed: Installed, tiny_model: Path) -> None:
    installed.sampler(f"{SAMPLER}    def select(self, step):\n        raise ZeroDivisionError('by design')\n")
    chosen = ("--model", tiny_model, "--sampler", "left_to_right")
    for arguments in (("generate", "a", "--max-tokens", 4), ("evaluate", "--task", "sort", "--count", 1)):
        said = refused(1, *arguments, *chosen)
        assert "Traceback" in said and "third_party.py" in said
        assert "Error: " in said and "sampler left_to_right failed: ZeroDivisionError: by design" in said


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
