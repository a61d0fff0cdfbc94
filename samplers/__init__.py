"""How a canvas is denoised: pure torch and pydantic, no server, no HTTP, no model."""

from samplers.base import ParameterError, Sampler, SamplerError, SamplerParams, Selection, Step
from samplers.cache import CacheMode
from samplers.canvas import BIDIRECTIONAL, Canvas, Layout, Scheme
from samplers.plugins import BrokenPlugin
from samplers.prediction import Prediction, Statistic, TokenChoice
from samplers.registry import (
    UnknownSamplerError,
    describe,
    get_sampler,
    is_ours,
    list_samplers,
    list_unavailable,
    named_samplers,
)

__all__ = [
    "BIDIRECTIONAL",
    "BrokenPlugin",
    "CacheMode",
    "Canvas",
    "Layout",
    "ParameterError",
    "Prediction",
    "Sampler",
    "SamplerError",
    "SamplerParams",
    "Scheme",
    "Selection",
    "Statistic",
    "Step",
    "TokenChoice",
    "UnknownSamplerError",
    "describe",
    "get_sampler",
    "is_ours",
    "list_samplers",
    "list_unavailable",
    "named_samplers",
]
