"""Guards the guard: a record of DiffusionGemma that is changed anywhere must fail."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.report import Status
from tests.conformance.runner import run
from tests.conformance.test_conformance import FIXTURES, needs_fixtures

Change = Callable[[dict[str, Any]], None]


def bump(key: str) -> Change:
    """Another token in a canvas of the last step."""

    def change(case: dict[str, Any]) -> None:
        case[key][-1][0][3] += 1

    return change


def shorter(case: dict[str, Any]) -> None:
    for key in ("decoder_input_canvas_per_step", "argmax_canvas_per_step"):
        del case[key][-1]
    case["nfe_decoder"] -= 1


CHANGES: dict[str, Change] = {
    "input": bump("decoder_input_canvas_per_step"),
    "draft": bump("argmax_canvas_per_step"),
    "shorter": shorter,
    "nfe": lambda case: case.update(nfe_decoder=case["nfe_decoder"] + 1),
    "output": lambda case: case["output"][0].__setitem__(-1, case["output"][0][-1] + 1),
    "rate": lambda case: case.update(tokens_per_forward=[1.01 * rate for rate in case["tokens_per_forward"]]),
    "seed": lambda case: case.update(manual_seed=case["manual_seed"] + 1),
    "unknown": lambda case: case["params"].update(guidance=2),
}


@needs_fixtures
@pytest.mark.parametrize("original", ["eos_stop", "batch_left_padded"])
def test_a_wrong_record_is_noticed(tmp_path: Path, original: str) -> None:
    folder = tmp_path / "diffusion_gemma"
    folder.mkdir()
    source = FIXTURES / folder.name
    for name in ("checkpoint", "forward.safetensors"):
        (folder / name).symlink_to(source / name)
    whole = json.loads((source / "cases.json").read_text())
    (right,) = (case for case in whole["cases"] if case["name"] == original)
    cases = [right]
    for name, change in CHANGES.items():
        cases.append(deepcopy(right) | {"name": name})
        change(cases[-1])
    (folder / "cases.json").write_text(json.dumps(whole | {"cases": cases}))
    found = {result.case: result.status for result in run(folder) if not result.case.startswith("forward.")}
    assert found == {original: Status.PASS} | dict.fromkeys(CHANGES, Status.FAIL)
