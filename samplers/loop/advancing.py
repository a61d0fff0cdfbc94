"""From a prediction to the next canvases."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from samplers.contract import SamplerError
from samplers.forward.prediction import Prediction
from samplers.forward.statistics import StatisticsRequest
from samplers.loop.committing import commit
from samplers.loop.deciding import Errors, decide
from samplers.loop.event import StepEvent
from samplers.loop.grid import Grid
from samplers.loop.guard import ContractError, failure
from samplers.loop.opened import Opened
from samplers.loop.part import Part


def advance(
    part: Part, opened: Opened, prediction: Prediction, may_wait: bool, broken: Mapping[int, SamplerError]
) -> list[StepEvent]:
    """Let each rule select among its rows' candidates, and commit. One event per row, in order.

    A row gets an error as its event and stops if its prediction is not finite, or if its sampler fails or breaks the
    contract. The other rows are not affected.

    Args:
        may_wait: True if a rule may commit nothing (`Selection.waits`), for drivers that bound the number of forwards.
        broken: rows whose forward pass failed, with the error.
    """
    errors: Errors = {**opened.failed, **broken}
    for i in _not_finite(opened, prediction):
        errors.setdefault(i, SamplerError("the model's output is not finite"))
    grid = Grid.of(part, opened, prediction)
    if part.revising:
        opened.committed = opened.committed & (grid.confidence > -torch.inf)
    return commit(part, opened, decide(part, opened, grid, may_wait, errors), errors)


def blame_bonus(
    part: Part, wanted: StatisticsRequest, opened: Opened, prediction: Prediction
) -> dict[int, SamplerError]:
    """Errors of rows whose output is not finite because of their sampler's bonus."""
    if wanted.bonus is None:
        return {}
    touched = set(opened.row[wanted.bonus.index].tolist())
    return {
        i: failure(part.rows[i].suspect, ContractError("with its bonus the model's output is not finite"))
        for i in _not_finite(opened, prediction)
        if i in touched
    }


def _not_finite(opened: Opened, prediction: Prediction) -> list[int]:
    """Rows with a confidence that is not finite."""
    confidence: Tensor = prediction.confidence
    if math.isfinite(confidence.sum().item()):
        return []  # a single pass: a finite sum rules out any value that is not finite
    return sorted(set(opened.row[~confidence.isfinite()].tolist()))
