"""What the routes need to know of the server."""

import time
from dataclasses import dataclass, field

from server.api.catalogue import Catalogue
from server.api.owner import Owners
from server.api.text_threads import TextThreads
from server.engine import Engine
from server.metrics import Metrics
from server.models.text import TextCodec
from server.settings import Settings


@dataclass(frozen=True)
class Serving:
    """A running server, as its routes see it. `created`: Unix time of its start."""

    engine: Engine
    text: TextCodec
    metrics: Metrics
    settings: Settings
    catalogue: Catalogue
    threads: TextThreads
    owners: Owners
    created: int = field(default_factory=lambda: int(time.time()))
