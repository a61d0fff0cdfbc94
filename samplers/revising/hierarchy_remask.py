"""One commit in every gap, with remasking."""

from dataclasses import replace

from pydantic import Field

from samplers.contract import SamplerParams, Selection, Step
from samplers.ranking import best
from samplers.rules.hierarchy import Hierarchy


class HierarchyRemask(Hierarchy):
    """Commit as `hierarchy` does, and open again what the model is no longer sure of in the block.

    Committed positions where no token reaches a confidence count as gaps too: the surest of them take their new token,
    the others are masked again, and at least one position more is committed than was opened.
    dInfer, arXiv 2510.08666, hierarchical decoding with remasking.
    """

    name = "hierarchy_remask"
    revises = True

    class Params(Hierarchy.Params):
        remask_below: float = Field(
            0.4, ge=0, le=1, description="open committed positions of less confidence than this"
        )

    def select(self, step: Step[SamplerParams]) -> Selection:
        opened = step.committed & (step.confidence < step.param("remask_below"))
        everything = replace(step, candidate=step.candidate | opened)
        chosen = super().select(everything).commit
        missing = opened.sum(dim=1, keepdim=True) + 1 - chosen.sum(dim=1, keepdim=True)
        chosen = chosen | best(step.confidence, everything.candidate & ~chosen, missing)
        return Selection(chosen & step.candidate, replace=chosen & opened, remask=opened & ~chosen)
