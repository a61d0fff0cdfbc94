"""State of the running server, as shared with the routes."""

import time
from dataclasses import dataclass, field

from server.api.model_names import ModelNames
from server.api.owner import Owners
from server.api.text_threads import TextThreads
from server.engine import Engine
from server.models.text.codec import TextCodec
from server.runtime.metrics import Metrics
from server.settings import Settings


@dataclass(frozen=True)
class Serving:
    """State of the running server. `created`: Unix time of its start."""

    engine: Engine
    text: TextCodec
    metrics: Metrics
    settings: Settings
    model_names: ModelNames
    threads: TextThreads
    owners: Owners
    created: int = field(default_factory=lambda: int(time.time()))
