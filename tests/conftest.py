"""Fixtures that several rooms use."""

from collections.abc import Iterator
from importlib.metadata import EntryPoints
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.installed import Installed, forget, look_at
from tests.tiny import write_tiny_model

# The same examples in every run, so that a change is what fails; none fails because the machine is busy.
# `make test-fuzz` tries fresh ones (`--hypothesis-profile=fresh`, and `--hypothesis-seed=N` for those of one run).
PATIENT = {"max_examples": 25, "deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("default", derandomize=True, **PATIENT)
settings.register_profile("fresh", derandomize=False, **PATIENT)
settings.load_profile("default")

# Samplers and tasks that happen to be installed are not under test. At import, because tests are made for each sampler.
look_at(lambda *, group: EntryPoints(), pytest.MonkeyPatch())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations hardly ever end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations mostly end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "ending", end_bias=10.0)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installed]:
    """Installs distributions of third parties, until the end of the test."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    there = Installed(folder)
    monkeypatch.syspath_prepend(str(folder))
    look_at(there.found, monkeypatch)
    yield there
    monkeypatch.undo()
    forget()
