"""Denoising of a canvas in pure torch and pydantic: no server, no HTTP, no model."""

from samplers.attention_pattern import BIDIRECTIONAL, AttentionPattern
from samplers.canvas import Canvas, Layout
from samplers.contract import (
    Adjustment,
    Modifier,
    ParameterError,
    Resampling,
    Sampler,
    SamplerError,
    SamplerParams,
    Selection,
    Slots,
    StateSpec,
    Step,
    StepContext,
    TokenBonus,
    View,
    Window,
)
from samplers.forward.prediction import Prediction
from samplers.forward.span import CacheMode
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoice, TokenChoices
from samplers.plugins import BrokenPlugin
from samplers.registry import (
    UnknownModifierError,
    UnknownSamplerError,
    describe,
    describe_modifier,
    get_modifier,
    get_sampler,
    is_ours,
    list_modifiers,
    list_samplers,
    list_unavailable,
    named_samplers,
)

__all__ = [
    "BIDIRECTIONAL",
    "Adjustment",
    "AttentionPattern",
    "BrokenPlugin",
    "CacheMode",
    "Canvas",
    "Layout",
    "Modifier",
    "ParameterError",
    "Prediction",
    "Resampling",
    "Sampler",
    "SamplerError",
    "SamplerParams",
    "Selection",
    "Slots",
    "StateSpec",
    "Statistic",
    "Step",
    "StepContext",
    "TokenBonus",
    "TokenChoice",
    "TokenChoices",
    "UnknownModifierError",
    "UnknownSamplerError",
    "View",
    "Window",
    "describe",
    "describe_modifier",
    "get_modifier",
    "get_sampler",
    "is_ours",
    "list_modifiers",
    "list_samplers",
    "list_unavailable",
    "named_samplers",
]
