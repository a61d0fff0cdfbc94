"""How many processor threads compute: one flag for every command that does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.commands.options import use_threads
from server.runtime import processors
from server.settings import load_settings
from tests.commands.application import refused, right, unmask

COMMANDS = [
    ("serve",),
    ("generate", "hi"),
    ("evaluate", "--task", "sort", "--sampler", "topk"),
    ("bench", "engine"),
    ("bench", "http"),
    ("train-model", "recipe.toml", "--out", "out"),
    ("train-policy", "recipe.toml", "--out", "out"),
]


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("threads", ["0", "-1", "two", "1025"])
def test_what_is_no_number_of_threads_is_refused(command: tuple[str, ...], threads: str) -> None:
    assert "--threads" in refused(2, *command, "--threads", threads)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_that_computes_says_how_many(command: tuple[str, ...]) -> None:
    named = [word for word in command[:2] if word in ("serve", "generate", "evaluate", "bench", "engine", "http")]
    assert "--threads" in right(*(named or command[:1]), "--help").stdout


def test_so_many_compute(tiny_model: Path) -> None:
    for threads in (1, 2):
        right("generate", "a", "--model", tiny_model, "--max-tokens", 4, "--threads", threads)
        assert torch.get_num_threads() == threads


def test_serve_takes_them_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_THREADS", "3")
    assert load_settings({}).threads == 3
    assert load_settings({"threads": "2"}).threads == 2
    monkeypatch.setenv("UNMASK_THREADS", "0")
    result = unmask("serve")
    assert result.exit_code == 2 and "UNMASK_THREADS" in result.stderr


def test_serve_uses_them_before_it_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = unmask("serve", "--port", 0, "--model", tmp_path, "--threads", 2)
    assert result.exit_code == 1  # there is no model in this folder
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("UNMASK_THREADS", "1")
    assert unmask("serve", "--port", 0, "--model", tmp_path).exit_code == 1
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("limit", "threads"), [(0.5, 1), (1.9, 1), (2.0, 2), (float("inf"), 4)])
def test_a_containers_limit_counts_where_nobody_says(
    limit: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(processors, "quota", lambda: limit)
    torch.set_num_threads(4)
    use_threads(None)
    assert torch.get_num_threads() == threads
    use_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_the_users_environment_counts_more_than_a_limit(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "4")
    monkeypatch.setattr(processors, "quota", lambda: 1.0)
    torch.set_num_threads(4)
    use_threads(None)
    assert torch.get_num_threads() == 4
