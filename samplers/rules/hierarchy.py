"""One commit in every gap."""

from pydantic import Field

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.ranking import leading_of_gaps


class Hierarchy(Sampler[SamplerParams]):
    """Commit the surest candidate of every gap if it is sure enough, all that are very sure, and always the surest.

    A gap is a run of adjacent candidates. Each commit splits its gap, so that distant parts fill up at the same time.
    dInfer, arXiv 2510.08666, hierarchical decoding.
    """

    name = "hierarchy"
    paper = "https://arxiv.org/abs/2510.08666"

    class Params(SamplerParams):
        threshold: float | None = Field(
            0.9, gt=0, le=1, description="commit every candidate above this confidence; null: none for that"
        )
        low_threshold: float | None = Field(
            0.4, ge=0, le=1, description="commit the surest of a gap above this confidence; null: whatever it is"
        )

    def select(self, step: Step[SamplerParams]) -> Selection:
        sure = step.confidence > step.param("threshold", none=2.0)
        leading = leading_of_gaps(step.candidate, step.confidence)
        return Selection(
            step.candidate & (sure | (leading & (step.confidence > step.param("low_threshold", none=-1.0))))
        )
