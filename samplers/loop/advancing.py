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
    """Let each rule select among its rows' candidates, and commit. One event a row, in order.

    A row whose prediction is not finite, or whose sampler fails or breaks the contract, gets an error as its event
    and goes no further; the others are not affected.

    Args:
        may_wait: whether a rule may commit nothing (`Selection.waits`), for drivers that bound the forwards.
        broken: rows of which the forward pass told nothing, and why.
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
    """Rows whose output is not finite with a bonus of their sampler's."""
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
        return []  # as good as sure, and in one pass: no sum of probabilities is finite with one that is not
    return sorted(set(opened.row[~confidence.isfinite()].tolist()))
