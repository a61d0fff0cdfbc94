"""The fixtures replay: exactly the cases that this project's samplers and models can do pass."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.__main__ import main
from tests.conformance.report import Result, Status, totals
from tests.conformance.runner import FAMILIES, find_families, run

FIXTURES = Path(os.environ.get("UNMASK_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no fixtures at {FIXTURES} (UNMASK_FIXTURES)")


@pytest.fixture(scope="module")
def results() -> list[Result]:
    return list(run(FIXTURES))


@needs_fixtures
def test_every_family_passes_whole(results: list[Result]) -> None:
    assert [r.line() for r in results if r.status is Status.FAIL] == []
    assert {r.family for r in results} == {path.name for path in find_families(FIXTURES)}
    assert all(any(r.family == family for r in results) for family in FAMILIES)


@needs_fixtures
def test_at_most_three_percent_are_known_differences(results: list[Result]) -> None:
    assert sum(r.status is Status.KNOWN for r in results) <= 0.03 * len(results)


@needs_fixtures
def test_a_family_folder_alone_and_the_exit_status(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(FIXTURES / "llada_moe")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "7 passed, 0 failed, 0 known"
    folder = tmp_path / "unheard_of"  # a family that nobody has built
    folder.mkdir()
    for name in ("cases.json", "forward.safetensors"):
        (folder / name).symlink_to(FIXTURES / "llada_moe" / name)
    assert main([str(folder), "--json", str(tmp_path / "out.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "0 passed, 7 failed, 0 known"
    assert all(line.startswith("FAIL unheard_of/") for line in lines[:-1])
    assert (tmp_path / "out.json").read_text().count('"FAIL"') == len(lines) - 1


def recorded(name: str, family: str = "llada") -> dict[str, Any]:
    """One of a family's cases."""
    (case,) = (c for c in json.loads((FIXTURES / family / "cases.json").read_text())["cases"] if c["name"] == name)
    return dict(case)


def family_with(folder: Path, cases: list[dict[str, Any]], family: str = "llada") -> Path:
    """A copy of a family with these cases only."""
    copy = folder / family
    copy.mkdir()
    for name in ("checkpoint", "forward.safetensors"):
        (copy / name).symlink_to(FIXTURES / family / name)
    whole = json.loads((FIXTURES / family / "cases.json").read_text())
    (copy / "cases.json").write_text(json.dumps(whole | {"cases": cases}))
    return copy


@needs_fixtures
def test_known_differences_are_told_apart(tmp_path: Path) -> None:
    known = tmp_path / "known.toml"
    known.write_text('"llada/fast_dual_*leftover*" = "why"\n"llada/low_conf_one_block" = "wrongly listed"\n')
    differing = "fast_dual_threshold_leftover_masks_2026-01"
    folder = family_with(tmp_path, [recorded(differing), recorded("low_conf_one_block")])
    results = {r.case: r for r in run(folder, known=known)}
    assert results[differing].line() == f"KNOWN llada/{differing}: why"
    assert results["low_conf_one_block"].status is Status.FAIL


@needs_fixtures
def test_a_wrong_record_is_noticed(tmp_path: Path) -> None:
    """Guards the guard: change a token, a middle state or a count of the record, and the case must fail."""
    changed = []
    for name in ("state", "output", "count"):
        case = recorded("low_conf_one_block") | {"name": name}
        if name == "state":
            case["trajectory"][3][0][-1] += 1
        elif name == "output":
            case["output"][0][-1] += 1
        else:
            case["model_calls"] += 1
        changed.append(case)
    folder = family_with(tmp_path, [recorded("low_conf_one_block"), *changed])
    results = {r.case: r.status for r in run(folder)}
    assert [results[name] for name in ("low_conf_one_block", "state", "output", "count")] == [
        *(Status.PASS, Status.FAIL, Status.FAIL, Status.FAIL)
    ]


@needs_fixtures
@pytest.mark.parametrize("version", ["2.0", "2.1"])
def test_a_wrong_record_of_llada2_is_noticed(tmp_path: Path, version: str) -> None:
    name = f"block8_threshold_mid_v{version}"
    changed = []
    for change in ("state", "output", "count", "parameter", "unknown"):
        case = recorded(name, "llada2") | {"name": change}
        if change == "state":
            case["trajectory"][3][0][-1] += 1
        elif change == "output":
            case["output"][0].pop()
        elif change == "count":
            case["nfe"] += 1
        elif change == "parameter":
            case["params"] |= {"threshold": 0.99}
        else:
            case["params"] |= {"editing_thresholds": 0.1}
        changed.append(case)
    folder = family_with(tmp_path, [recorded(name, "llada2"), *changed], "llada2")
    status = {r.case: r.status for r in run(folder)}
    assert status.pop(name) is Status.PASS
    assert {case: status[case] for case in status if not case.startswith("forward.")} == dict.fromkeys(
        ("state", "output", "count", "parameter", "unknown"), Status.FAIL
    )


def test_nothing_to_replay_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "nowhere")])
    assert exit_info.value.code == 2
    assert "no cases.json" in capsys.readouterr().err


def test_the_last_line_counts() -> None:
    results = [Result("f", str(i), s) for i, s in enumerate([Status.PASS, Status.FAIL, Status.PASS, Status.KNOWN])]
    assert totals(results) == "2 passed, 1 failed, 1 known"
