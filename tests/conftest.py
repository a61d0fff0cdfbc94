"""Fixtures that several rooms use."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import write_tiny_model

# The same examples in every run, and none fails because the machine is busy.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations hardly ever end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations mostly end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "ending", end_bias=10.0)
