"""Fixtures that several rooms use."""

from pathlib import Path

import pytest

from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations hardly ever end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def ending_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model whose generations mostly end early."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "ending", end_bias=4.0)
