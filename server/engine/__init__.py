"""The engine: queue, scheduler and the loop that drives a backend. Independent of HTTP."""

from samplers.loop.event import StepEvent
from server.backends.contract import Backend, ModelInfo
from server.engine.engine import Engine
from server.engine.generation import Generation
from server.engine.quota import Quota
from server.engine.request import (
    Budget,
    EngineError,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    KeyLimitError,
    NotServingError,
    Owner,
    QueueFullError,
    RequestError,
)
from server.engine.scheduler import Limits

__all__ = [
    "Backend",
    "Budget",
    "Engine",
    "EngineError",
    "Event",
    "FinishReason",
    "Finished",
    "Generation",
    "GenerationRequest",
    "KeyLimitError",
    "Limits",
    "ModelInfo",
    "NotServingError",
    "Owner",
    "QueueFullError",
    "Quota",
    "RequestError",
    "StepEvent",
]
