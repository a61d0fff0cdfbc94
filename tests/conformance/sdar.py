"""SDAR's `block_diffusion_generate`, which draws tokens for whole blocks from one stream of random numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers import AttentionPattern, CacheMode, Canvas, Sampler, Selection, Step, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import run
from samplers.ranking import best
from samplers.rules.topk import TopK
from samplers.schedule import quota
from server.backends.torch.backend import TorchBackend
from tests.conformance.blocks import Drawer, Strict, cached_prefix, masked, parameters
from tests.conformance.forwards import Tensors, whole
from tests.conformance.generation import Family
from tests.conformance.models import fed_logits
from tests.conformance.replay import compare_states
from tests.conformance.report import Difference, NotBuilt

DEFAULTS: dict[str, Any] = {
    "mask_id": None,
    "gen_length": 128,
    "block_length": 8,
    "denoising_steps": 8,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.85,
    "eb_threshold": None,
    "stopping_criteria_idx": None,
}


def surest(step: Step) -> Tensor:
    """The quota's surest of one row; among equals those that `torch.topk` takes of the block, whatever it likes.

    After top-p many a token is drawn with a probability of exactly 1.
    """
    count = quota(step)
    ours = best(step.confidence, step.candidate, count)
    length = int(step.layout.block_length)
    # Positions of the prompt stand in the block, too.
    given = int(step.layout.prompt_length + step.block_start) % length
    score = step.confidence.masked_fill(~step.candidate, -torch.inf)[0]
    padded = torch.full((length,), -torch.inf)
    padded[given:] = score[: length - given]
    chosen = torch.zeros_like(padded, dtype=torch.bool)
    chosen[padded.topk(min(int(count), length)).indices] = True
    theirs = torch.zeros_like(ours)
    theirs[0, : length - given] = chosen[given:]
    theirs &= step.candidate
    return theirs if score[theirs[0]].sort().values.equal(score[ours[0]].sort().values) else ours


class Static(TopK):
    """`low_confidence_static`."""

    def select(self, step: Step) -> Selection:
        return Selection(surest(step))


class Dynamic(Strict):
    """`low_confidence_dynamic`."""

    def least(self, step: Step) -> Tensor:
        return surest(step)


@dataclass
class Draws:
    """A `predict` for our loop that draws a token for every position of the block, decided or not."""

    backend: TorchBackend
    row: Row
    draw: Drawer

    def __call__(self, query: Query) -> Prediction:
        layout = self.row.canvas.layout
        place = layout.block_place(self.row.block)
        first = place - query.spans[0].start
        logits = fed_logits(self.backend, query.canvases, query.spans)[0, first : first + layout.block_length]
        token, confidence = self.draw(logits)
        at = query.position - place
        return Prediction(token[at], confidence[at], {})


class SDARFamily(Family):
    """The folder."""

    def _forward(self, name: str, tensors: Tensors) -> None:
        with torch.inference_mode():
            if name == "cached_prefix":
                size = tensors["cached_prefix.block_logits_with_cache"].shape[1]
                cached_prefix(self.backend(), tensors, size)
            elif f"{name}.attention_mask" in tensors:
                masked(self.backend(), name, tensors)
            else:
                whole(self.backend(), name, tensors)

    def _generate(self, case: dict[str, Any]) -> None:
        """With and without a cache, which is exact: the same tokens after every forward, the same forwards."""
        if case["function"] != "block_diffusion_generate":
            raise NotBuilt(case["function"])
        with torch.inference_mode():
            for cache in (CacheMode.NONE, CacheMode.PREFIX):
                self._replay(case, cache)

    def _replay(self, case: dict[str, Any], cache: CacheMode) -> None:
        params = parameters(case, DEFAULTS)
        (prompt,) = case["prompt"]
        length, stops = params["block_length"], params["stopping_criteria_idx"] or []
        canvas = Canvas.blank(
            prompt, params["gen_length"], params["mask_id"], length, pattern=AttentionPattern(causal_block=length)
        )
        sampler, chosen = strategy(params, canvas.layout.blocks)
        row = Row(canvas, sampler, sampler.Params(**chosen), cache=cache)
        draw = Drawer(case["manual_seed"], params["temperature"], params["top_k"], params["top_p"])
        predict = Draws(self.backend(), row, draw)
        states: list[list[int]] = []
        finished = 0
        block = row.block
        for ((_, event),) in run([row], predict):
            if event.error is not None:
                raise event.error
            states.append(canvas.tokens.tolist())
            if row.finished or row.block != block:
                finished += 1
                if bool(torch.isin(canvas.generated, torch.tensor(stops)).any()):
                    break
            block = row.block
        recorded = [state for (state,) in case["trajectory"]]
        (output,) = case["output"]
        if canvas.layout.cut and row.finished:  # the original goes on to fill what no text is made of, and keeps it
            recorded = recorded[: len(states)]
            output = output[: len(prompt) + params["gen_length"]]
        compare_states(states, recorded, 0)
        compare_states([prompt + canvas.generated.tolist()[: len(output) - len(prompt)]], [output], 0)
        # Theirs computes the prompt's whole blocks, and every block that is finished, once more to store what it
        # keeps of them; ours does so in the next block's first forward.
        stored = finished + (len(prompt) >= length)
        spared = case["nfe_denoise"] - len(recorded) if canvas.layout.cut and row.finished else 0
        for key, count in (("nfe_denoise", row.forwards + spared), ("nfe_store_kv", stored)):
            if count != case[key]:
                raise Difference(f"cache {cache}: {key} is {count}, the original's {case[key]}")


def strategy(params: dict[str, Any], blocks: int) -> tuple[Sampler, dict[str, Any]]:
    """Our sampler for a strategy, and its parameters. Raises NotBuilt for one that the original cannot do either."""
    steps = {"steps": params["denoising_steps"] * blocks}
    match params["remasking_strategy"]:
        case "sequential":
            return get_sampler("sequential"), steps
        case "low_confidence_static":
            return Static(), steps
        case "low_confidence_dynamic":
            return Dynamic(), steps | {"threshold": float(params["confidence_threshold"])}
        case other:
            raise NotBuilt(f"strategy {other}")
