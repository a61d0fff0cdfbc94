"""Guards the guards of the block-causal families: whatever is changed in a record, its case must fail."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.report import Status
from tests.conformance.runner import run
from tests.conformance.test_conformance import FIXTURES, needs_fixtures

Case = dict[str, Any]
Change = Callable[[Case], None]


def shift(numbers: list[Any]) -> None:
    """Change the last token of nested lists."""
    while isinstance(numbers[-1], list):
        numbers = numbers[-1]
    numbers[-1] = (numbers[-1] + 1) % 300


def flip(case: Case) -> None:
    stores = case["forward_updates_cache"]
    stores[0], stores[1] = stores[1], stores[0]


def count(key: str) -> Change:
    return lambda case: case.update({key: case[key] + 1})


CHANGES: dict[str, tuple[str, dict[str, Change]]] = {
    "sdar": (
        "low_confidence_dynamic_block8_few_steps",
        {
            "state": lambda case: shift(case["trajectory"][2]),
            "output": lambda case: shift(case["output"]),
            "denoise": count("nfe_denoise"),
            "store": count("nfe_store_kv"),
            "seed": count("manual_seed"),
            "unknown": lambda case: case["params"].update(guidance=1.0),
        },
    ),
    "fast_dllm_v2": (
        "block8_small8",
        {
            "canvas": lambda case: shift(case["canvas_before_each_forward"][3]),
            "output": lambda case: shift(case["output"]),
            "denoise": count("nfe_denoise"),
            "forwards": count("nfe"),
            "stores": flip,
            "threshold": lambda case: case["params"].update(threshold=0.9),
            "unknown": lambda case: case["params"].update(guidance=1.0),
        },
    ),
}


@needs_fixtures
@pytest.mark.parametrize("family", CHANGES)
def test_a_wrong_record_is_noticed(family: str, tmp_path: Path) -> None:
    name, changes = CHANGES[family]
    whole = json.loads((FIXTURES / family / "cases.json").read_text())

    def recorded() -> Case:
        (case,) = (
            each for each in json.loads((FIXTURES / family / "cases.json").read_text())["cases"] if each["name"] == name
        )
        return dict(case)

    cases = [recorded()]
    for what, change in changes.items():
        cases.append(recorded() | {"name": what})
        change(cases[-1])
    folder = tmp_path / family
    folder.mkdir()
    for part in ("checkpoint", "forward.safetensors"):
        (folder / part).symlink_to(FIXTURES / family / part)
    (folder / "cases.json").write_text(json.dumps(whole | {"cases": cases}))
    found = {r.case: r.status for r in run(folder) if not r.case.startswith("forward.")}
    assert found == {name: Status.PASS} | dict.fromkeys(changes, Status.FAIL)
