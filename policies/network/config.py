"""Shape and inputs of a policy network, as recipes and checkpoints state them."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from policies.network import features
from policies.network.features import Feature
from samplers.learned.policy import Action


class PolicyConfig(BaseModel):
    """Shape and inputs of a policy. Defaults are the paper's (arXiv 2512.09106, 3.2, appendix H), except for time.

    Attributes:
        features, top: features of positions (see `policies.network.features`); number of largest probabilities.
        tokens: vocabulary size of predicted tokens, which get an embedding; 0 if the policy reads none. With tokens, it
            only fits models with the same tokenizer.
        region: read the whole generation region, or candidates only, which is less work for the model.
        time_period: highest frequency of the time embedding, the lowest being 1. In the paper's code it is 1, so that
            all frequencies are the same.
        blocks: number of transformer blocks.
        output_bias: initial logit; -2 commits about one position in eight.
        takes_speed: take a speed from 0 (careful) to 1 (fast) as input.
        temperature, floor: defaults of requests.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: tuple[Feature, ...] = Field(("confidence",), min_length=1)
    top: int = Field(1, ge=1, le=64)
    tokens: int = Field(0, ge=0, le=1_000_000)
    region: bool = True
    hidden: int = Field(128, ge=4, le=1024)
    heads: int = Field(2, ge=1, le=32)
    feedforward: int = Field(512, ge=4, le=8192)
    blocks: int = Field(1, ge=1, le=8)
    time_period: float = Field(100.0, ge=1, le=1e6)
    output_bias: float = Field(-2.0, ge=-20, le=20)
    action: Action = "bernoulli"
    stop_logit: float = Field(0.0, ge=-100, le=100)
    takes_speed: bool = False
    temperature: float = Field(1.0, ge=0, le=100)
    floor: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "PolicyConfig":
        if len(set(self.features)) < len(self.features):
            raise ValueError("a feature is named twice")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden = {self.hidden} does not divide into {self.heads} heads of even size")
        if "top_logs" in self.features and self.top < 2:
            raise ValueError("top_logs needs a top of at least 2")
        return self

    @property
    def numbers(self) -> int:
        """Numbers per position."""
        return sum(features.width(feature, self.top) for feature in self.features)

    @property
    def largest(self) -> int:
        """Number of largest probabilities that the model must return."""
        return self.top if {"top", "top_logs"} & set(self.features) else 0
