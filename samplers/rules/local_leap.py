"""A lower threshold near confident positions."""

from pydantic import Field

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.ranking import distance_to


class LocalLeap(Sampler[SamplerParams]):
    """Commit candidates above a threshold, and neighbours of those above a lower one; always the surest candidate.

    LocalLeap, arXiv 2510.07081: candidates above the threshold are anchors that lower the threshold near them.
    """

    name = "local_leap"
    paper = "https://arxiv.org/abs/2510.07081"

    class Params(SamplerParams):
        threshold: float = Field(0.9, gt=0, le=1, description="commit candidates with confidence >= this: anchors")
        relaxed_threshold: float = Field(0.75, gt=0, le=1, description="the same, near an anchor")
        radius: int = Field(4, ge=0, le=1_000_000, description="positions from an anchor that are near")

    def select(self, step: Step[SamplerParams]) -> Selection:
        anchor = step.candidate & (step.confidence >= step.param("threshold"))
        near = distance_to(anchor) <= step.param("radius")
        return Selection(anchor | (step.candidate & near & (step.confidence >= step.param("relaxed_threshold"))))
