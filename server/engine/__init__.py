"""The engine: queue, scheduler and the loop that drives a backend. It knows no HTTP."""

from server.engine.backend import Backend, ModelInfo
from server.engine.engine import Engine
from server.engine.generation import Generation
from server.engine.request import (
    Committed,
    EngineError,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    NotServingError,
    QueueFullError,
    RequestError,
)
from server.engine.scheduler import Limits

__all__ = [
    "Backend",
    "Committed",
    "Engine",
    "EngineError",
    "Event",
    "FinishReason",
    "Finished",
    "Generation",
    "GenerationRequest",
    "Limits",
    "ModelInfo",
    "NotServingError",
    "QueueFullError",
    "RequestError",
]
