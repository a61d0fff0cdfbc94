"""Dream's `diffusion_generate`, its own and Fast-dLLM's, the latter with caches too."""

from typing import Any

import torch

from samplers import CacheMode, Canvas, Sampler
from tests.conformance.dream_rules import (
    BOUNDED,
    DEFAULTS,
    BlockThreshold,
    BoundedThreshold,
    Draws,
    ReleasedDream,
    ReleasedRow,
)
from tests.conformance.generation import Family
from tests.conformance.models import check_cache
from tests.conformance.originals import stream_of
from tests.conformance.replay import compare_states, distinct, replay
from tests.conformance.report import Difference, NotBuilt

OTHERS = {
    *("max_new_tokens", "block_length", "dual_cache", "num_return_sequences", "mask_token_id"),
    *("output_history", "return_dict_in_generate"),  # say what is handed back
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # not looked at
}


class DreamFamily(Family):
    """The folder: every case is a call of one function, of three modules."""

    @torch.inference_mode()
    def _generate(self, case: dict[str, Any]) -> None:
        """Tokens after every forward, and the number of forwards."""
        if unknown := set(case["params"]) - DEFAULTS.keys() - OTHERS:
            raise NotBuilt(f"generation with {', '.join(sorted(unknown))}")
        mask_id = self.cases["mask_id"]
        if case["params"].get("mask_token_id", mask_id) != mask_id:
            raise NotBuilt("generation with another mask token")
        params = self._complete(case["params"])
        in_blocks = "generation_utils_block" in case["origin"]
        cache = CacheMode.NONE
        if in_blocks:
            cache = CacheMode.DUAL if params.get("dual_cache") else CacheMode.PREFIX
        check_cache(self.backend(), cache)
        # Our canvases have no padding: what the original pads at the left is cut off, here and from its record.
        masks = case["attention_mask"] or [[1]] * len(case["prompt"])
        each = [(prompt, mask.index(1)) for prompt, mask in zip(case["prompt"], masks, strict=True)]
        each = [pair for pair in each for _ in range(params.get("num_return_sequences", 1))]
        given = len(case["prompt"][0])
        length = given + params["max_new_tokens"] if "max_new_tokens" in params else params["max_length"]
        block_length = params.get("block_length") if in_blocks else None
        pattern = self.backend().info.pattern
        limit = None
        if params["alg"] != BOUNDED:
            blocks = (length - given) // block_length if block_length else 1
            limit = params["steps"] // blocks + in_blocks
        draws = Draws(self.backend(), params, stream_of(case["manual_seed"]), length, mask_id, limit)
        sampler, chosen = rule(draws, in_blocks)
        draws.rows = rows = [
            ReleasedRow(
                Canvas.blank(prompt[cut:], length - given, mask_id, block_length, pattern=pattern),
                sampler,
                sampler.Params(**chosen),
                fill_after_end=False,
                cache=cache,
            )
            for prompt, cut in each
        ]
        recording = replay(rows, draws, most=case["nfe"] + 1)  # one more is a difference
        for i, (states, (_, cut)) in enumerate(zip(recording.states, each, strict=True)):
            compare_states(distinct(states), [canvas[i][cut:] for canvas in case["trajectory"]], i)
            compare_states(states[-1:], [case["output"][i][cut:]], i)
        # After its first forward a block is always fed again, finished or not.
        forwards = recording.lockstep_forwards(least=1 + in_blocks)
        if not in_blocks and params["alg"] != BOUNDED:
            forwards = max(forwards, params["steps"])  # it goes on when everything is decided
        if forwards != case["nfe"]:
            raise Difference(f"{forwards} forwards, the original's nfe is {case['nfe']}")

    def _complete(self, params: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments with what they are if they are not given; None switches off."""
        off = {"alg_temp": 0.0, "temperature": 0.0, "top_p": 1.0}
        return DEFAULTS | params | {name: value for name, value in off.items() if params.get(name, 1) is None}


def rule(draws: Draws, in_blocks: bool) -> tuple[Sampler, dict[str, Any]]:
    """Our sampler for an algorithm of theirs, with its parameters."""
    params = draws.params
    if params["alg"] != BOUNDED:
        names = {name: params[name] for name in ("steps", "eps", "alg_temp")}
        # With blocks every other name means this one.
        return ReleasedDream(draws), names | {"alg": "entropy" if in_blocks else params["alg"]}
    bound = {"threshold": params["threshold"]}
    if in_blocks:
        return BlockThreshold(draws), bound
    return BoundedThreshold(draws), bound | {"steps": params["steps"]}
