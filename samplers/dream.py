"""Dream's four rules, on its schedule of times."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from samplers.base import SamplerParams, Selection, Step, best
from samplers.prediction import Statistic
from samplers.schedule import ScheduledSampler, share_of


class Dream(ScheduledSampler):
    """Unmask as Dream does: a share of the candidates that follows from the time, at random or the surest of them.

    Dream 7B, arXiv 2508.15487, its generation_utils.py. At step s of S the time falls from t to u on a straight line
    from 1 to `eps`, and the share is 1 - u / t, everything at the last step. Sure is what the distribution says that
    tokens are drawn from, after temperature, top-k and top-p. Where the share rounds to nothing, the surest candidate
    is committed all the same, where the original spends a forward for nothing.
    """

    name = "dream"
    paper = "https://arxiv.org/abs/2508.15487"
    statistics = frozenset({Statistic.CHOSEN_CONFIDENCE, Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN})

    class Params(SamplerParams):
        alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = Field(
            "entropy", description="at random; by confidence; by margin; by entropy"
        )
        steps: int | None = Field(
            None, ge=1, le=1_000_000, description="forward passes for the whole generation (default: one a token)"
        )
        eps: float = Field(1e-3, gt=0, lt=1, description="the time at the end")
        alg_temp: float = Field(
            0.0, ge=0, le=100, description="draw positions from softmax(sureness / alg_temp); 0 takes the surest"
        )

    def select(self, step: Step) -> Selection:
        kinds = [getattr(params, "alg", "entropy") for params in step.params]
        scores = {
            "maskgit_plus": step.extra[Statistic.CHOSEN_CONFIDENCE],
            "topk_margin": step.extra[Statistic.CHOSEN_MARGIN],
            "entropy": -step.extra[Statistic.CHOSEN_ENTROPY],
        }
        share = _share(step)
        uniform = step.uniform()
        score = torch.stack([scores.get(kind, scores["entropy"])[row] for row, kind in enumerate(kinds)]).double()
        warmth = step.param("alg_temp").double()
        noise = -(-uniform.clamp(min=2.0**-53).log()).log()
        score = torch.where(warmth > 0, score / warmth.clamp(min=1e-9) + noise, score)
        count = (step.candidate.sum(dim=1, keepdim=True) * share).long().clamp(min=1)
        chosen = best(score, step.candidate, count)
        drawn = step.candidate & (uniform < share)
        origin = torch.tensor([kind == "origin" for kind in kinds], device=score.device)[:, None]
        return Selection(torch.where(origin, drawn, chosen))


def _share(step: Step) -> Tensor:
    """The share of its candidates that each row commits, float32 [rows, 1]."""
    rows = []
    counters = zip(step.params, step.layouts, step.block.tolist(), step.block_step.tolist(), strict=True)
    for params, layout, (block,), (s,) in counters:
        assert isinstance(params, Dream.Params)
        steps = share_of(params.steps or layout.gen_length, layout, block)
        times = torch.linspace(1, params.eps, steps + 1)
        rows.append(1.0 if s + 1 >= steps else float(1 - times[s + 1] / times[s]))
    return torch.tensor(rows, device=step.candidate.device)[:, None]
