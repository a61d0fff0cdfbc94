"""The inputs of a policy network."""

from dataclasses import dataclass

from torch import Tensor

from policies.network import features
from policies.network.config import PolicyConfig
from samplers import Step


@dataclass(frozen=True)
class Observation:
    """Inputs of some rows, shaped as `UnmaskingPolicy.forward` takes them.

    Attributes:
        places: int64 [n], the positions of `features` and `tokens` among those of all rows; None: all, as they lie.
    """

    features: Tensor
    masked: Tensor
    valid: Tensor
    time: Tensor
    tokens: Tensor | None = None
    places: Tensor | None = None


def observe(step: Step, config: PolicyConfig, places: Tensor | None = None) -> Observation:
    """Observation of a step for a policy of this configuration; with `places`, features of these positions only."""
    length = step.layout.gen_length
    tokens = step.token if config.tokens else None
    return Observation(
        features=features.read(step, config.features, places),
        masked=step.masked,
        valid=step.position < length,
        time=step.forward[:, 0] / length[:, 0],
        tokens=tokens if tokens is None or places is None else tokens.take(places),
        places=places,
    )
