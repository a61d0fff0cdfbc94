from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.serving import Running, serving
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Running]:
    """A server whose generations hardly ever end early; its default sampler is topk."""
    with serving(tiny_model) as running:
        yield running


@pytest.fixture(scope="session")
def ending_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model ends its text in the midst of a region of 32."""
    with serving(write_tiny_model(tmp_path_factory.mktemp("models") / "ending", end_bias=8.0)) as running:
        yield running
