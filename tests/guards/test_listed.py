"""The list of guards fits the code. Taking them out takes longer than a test may: `make guards`."""

import ast
import re

import pytest

from tests.guards.listed import ROOT, Guard, guards

ALL = guards()


def test_there_are_guards_and_no_name_twice() -> None:
    assert ALL and len({(guard.area, guard.name) for guard in ALL}) == len(ALL)


@pytest.mark.parametrize("guard", ALL, ids=lambda guard: f"{guard.area}-{guard.name}")
def test_a_guard_can_be_taken_out_and_its_tests_exist(guard: Guard) -> None:
    ast.parse(guard.removed((ROOT / guard.file).read_text(encoding="utf-8")))
    assert guard.tests
    for test in guard.tests:
        path, _, name = test.partition("::")
        assert name, f"{test}: name the test, not the file"
        name = name.rpartition("::")[2].partition("[")[0]
        assert re.search(rf"def {re.escape(name)}\(", (ROOT / path).read_text(encoding="utf-8")), test
