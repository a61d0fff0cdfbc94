"""The stage that moves the logits, so that a draw is about right at 0.5 and still explores."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from policies.training.recipe import Shift
from policies.training.training_run import TrainingRun


def shift(run: TrainingRun, stage: Shift) -> Iterator[dict[str, Any]]:
    """Make `scale * (logit - logit(cut))` of every logit."""
    with torch.no_grad():
        head = run.network.head
        head.weight.mul_(stage.scale)
        head.bias.sub_(math.log(stage.cut / (1 - stage.cut))).mul_(stage.scale)
    yield {"cut": stage.cut, "scale": stage.scale}
