"""How a canvas is denoised: pure torch and pydantic, no server, no HTTP, no model."""

from samplers.base import ParameterError, Sampler, SamplerError, SamplerParams, Selection, Step
from samplers.canvas import Canvas, Layout
from samplers.prediction import Prediction, Statistic, TokenChoice
from samplers.registry import UnknownSamplerError, get_sampler, list_samplers

__all__ = [
    "Canvas",
    "Layout",
    "ParameterError",
    "Prediction",
    "Sampler",
    "SamplerError",
    "SamplerParams",
    "Selection",
    "Statistic",
    "Step",
    "TokenChoice",
    "UnknownSamplerError",
    "get_sampler",
    "list_samplers",
]
