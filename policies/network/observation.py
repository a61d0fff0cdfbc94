"""The inputs of a policy network."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from policies.network import features
from policies.network.config import PolicyConfig
from samplers import Step


@dataclass(frozen=True)
class Observation:
    """What a policy sees of some rows: the arguments of `UnmaskingPolicy.forward`.

    Attributes:
        columns: int64 [rows, n], which positions `features` and `tokens` are of; None: all.
    """

    features: Tensor
    masked: Tensor
    valid: Tensor
    time: Tensor
    tokens: Tensor | None = None
    columns: Tensor | None = None


def observe(step: Step[Any], config: PolicyConfig, columns: Tensor | None = None) -> Observation:
    """A step as a policy of this configuration sees it; with `columns`, features of these positions only."""
    length = step.layout.gen_length
    tokens = step.token if config.tokens else None
    return Observation(
        features=features.read(step, config.features, columns),
        masked=step.masked,
        valid=step.position < length,
        time=step.forward[:, 0] / length[:, 0],
        tokens=tokens if tokens is None or columns is None else tokens.gather(1, columns),
        columns=columns,
    )
