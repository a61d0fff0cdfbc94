from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from structlog.processors import KeyValueRenderer

from tests.api.models import close_models
from tests.api.serving import Running, serving
from tests.tiny import write_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _plain_logs() -> None:
    """Log lines go where pytest shows them with a failure."""
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, KeyValueRenderer()],
        logger_factory=structlog.stdlib.LoggerFactory(),
    )


@pytest.fixture(scope="session", autouse=True)
def _close_models() -> Iterator[None]:
    """The last to be torn down, since it was the first to be set up."""
    yield
    close_models()


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
