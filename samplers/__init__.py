"""How a canvas is denoised: pure torch and pydantic, no server, no HTTP, no model."""

from samplers.attention_pattern import BIDIRECTIONAL, AttentionPattern
from samplers.canvas import Canvas, Layout
from samplers.contract import ParameterError, Sampler, SamplerError, SamplerParams, Selection, Step
from samplers.forward.prediction import Prediction
from samplers.forward.span import CacheMode
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoice
from samplers.plugins import BrokenPlugin
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
    "AttentionPattern",
    "BrokenPlugin",
    "CacheMode",
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
    "describe",
    "get_sampler",
    "is_ours",
    "list_samplers",
    "list_unavailable",
    "named_samplers",
]
