"""Dream's `diffusion_generate`, its own and Fast-dLLM's, the latter with caches too."""

from typing import Any

from samplers import CacheMode, Canvas, Sampler, get_sampler
from tests.conformance.dream_rules import BoundedThreshold, Draws, ReleasedDream, Reopening
from tests.conformance.generation import Family
from tests.conformance.originals import stream_of
from tests.conformance.replay import compare_states, distinct, replay
from tests.conformance.report import Difference, NotBuilt

PARAMETERS = {
    *("max_new_tokens", "max_length", "steps", "eps", "alg", "alg_temp", "temperature", "top_p", "top_k"),
    *("threshold", "block_length", "dual_cache", "num_return_sequences", "mask_token_id"),
    *("output_history", "return_dict_in_generate"),  # say what is handed back
    *("bos_token_id", "eos_token_id", "pad_token_id"),  # not looked at
}
THRESHOLD = "confidence_threshold"


class DreamFamily(Family):
    """The folder: every case is a call of one function, of three modules."""

    def _generate(self, case: dict[str, Any]) -> None:
        """Tokens after every forward, and the number of forwards."""
        params, mask_id = case["params"], self.cases["mask_id"]
        if unknown := set(params) - PARAMETERS:
            raise NotBuilt(f"generation with {', '.join(sorted(unknown))}")
        if params.get("mask_token_id") not in (None, mask_id):
            raise NotBuilt("generation with a mask token of its own")
        in_blocks = case["origin"].endswith("generation_utils_block.py")
        # Our canvases have no padding: what the original pads at the left is cut off, here and from its record.
        prompts = zip(case["prompt"], case["attention_mask"] or [[1]] * len(case["prompt"]), strict=True)
        padded = [(prompt, mask.index(1)) for prompt, mask in prompts for _ in range(params.get("num_return_sequences", 1))]
        given = len(case["prompt"][0])
        length = given + params["max_new_tokens"] if params.get("max_new_tokens") else params.get("max_length", 20)
        draws = Draws(self.backend(), params, stream_of(case["manual_seed"]), length)
        sampler, chosen = self._rule(params, draws, in_blocks)
        cache = CacheMode.NONE
        if in_blocks:
            cache = CacheMode.DUAL if params.get("dual_cache") else CacheMode.PREFIX
        draws.rows = rows = [
            Reopening(
                Canvas.blank(
                    prompt[cut:],
                    length - given,
                    mask_id,
                    params.get("block_length") if in_blocks else None,
                    scheme=self.backend().info.scheme,
                ),
                sampler,
                sampler.Params(**chosen),
                fill_after_end=False,
                cache=cache,
            )
            for prompt, cut in padded
        ]
        # An original that gives up leaves masks, and says so; ours would go on. One forward more is a difference.
        recording = replay(rows, draws, most=case["nfe"] + (not case["masks_left"]))
        for i, (states, (_, cut)) in enumerate(zip(recording.states, padded, strict=True)):
            compare_states(distinct(states), [canvas[i][cut:] for canvas in case["trajectory"]], i)
            compare_states(states[-1:], [case["output"][i][cut:]], i)
        forwards = recording.lockstep_forwards(least=1 + in_blocks)
        if not in_blocks and params.get("alg") != THRESHOLD:
            forwards = max(forwards, params.get("steps", 512))  # it goes on when everything is decided
        if forwards != case["nfe"]:
            raise Difference(f"{forwards} forwards, the original's nfe is {case['nfe']}")

    def _rule(self, params: dict[str, Any], draws: Draws, in_blocks: bool) -> tuple[Sampler, dict[str, Any]]:
        """Our sampler for its algorithm, with its parameters."""
        alg = params.get("alg", "origin")
        if alg == THRESHOLD:
            bound = {"threshold": params.get("threshold", 0.9)}
            if in_blocks:
                return get_sampler("threshold"), bound
            return BoundedThreshold(draws), bound | {"steps": params.get("steps", 512)}
        return ReleasedDream(draws), {
            "alg": "entropy" if in_blocks else alg,  # with blocks every other name means this one
            "steps": params.get("steps", 512),
            "eps": params.get("eps", 1e-3),
            "alg_temp": params.get("alg_temp") or 0.0,
        }
