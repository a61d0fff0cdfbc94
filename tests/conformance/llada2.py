"""LLaDA2.0 and 2.1: their model's own `generate`, without a cache and with the exact one."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from samplers import CacheMode, Canvas, Sampler, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Predict, Query
from samplers.forward.span import ForwardSpan, KVSlot
from samplers.loop.row import Row
from samplers.loop.run import run
from server.backends.torch.backend import TorchBackend
from server.models.families.llada2 import Router
from tests.conformance.blocks import within_range
from tests.conformance.decoders import draw
from tests.conformance.forwards import ForwardCheck, Tensors, compare, given
from tests.conformance.generation import Family
from tests.conformance.models import fed_logits
from tests.conformance.originals import stream_of
from tests.conformance.report import Difference, NotBuilt

LATEST = {
    **{"temperature": 0.0, "block_length": 32, "steps": 32, "gen_length": 2048, "top_p": None, "top_k": None},
    **{"eos_early_stop": False, "minimal_topk": 1, "threshold": 0.95, "eos_id": 156892, "mask_id": 156895},
    **{"editing_threshold": 0.9, "max_post_steps": 16, "num_to_transfer": 1},
}
"""The originals' parameters and their defaults; the last three are 2.1's."""
EDITING = ("editing_threshold", "max_post_steps", "num_to_transfer")


def blocks(backend: TorchBackend, name: str, tensors: Tensors) -> None:
    """A whole forward under a block-causal mask, and which experts its routers chose."""
    mask = tensors[f"{name}.attention_mask_additive"][0, 0]
    size = int((mask[0] == 0).sum())
    block = torch.arange(len(mask)) // size
    if not (mask == 0).equal(block[None] <= block[:, None]):
        raise NotBuilt("attention that is not block-causal")
    canvases = [given(tokens) for tokens in tensors[f"{name}.input_ids"]]
    routers = [module for module in backend.network.modules() if isinstance(module, Router)]
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        router.register_forward_hook(lambda self, args, out: seen.append((self.logits(args[0]), out[0])))
        for router in routers
    ]
    try:
        logits = fed_logits(backend, canvases, [ForwardSpan(0, len(mask), None, len(mask), size)] * len(canvases))
    finally:
        for hook in hooks:
            hook.remove()
    compare("logits", logits, tensors[f"{name}.logits"])
    for i, (scores, chosen) in enumerate(seen):
        if (expected := tensors.get(f"{name}.router_logits_{i}")) is not None:
            compare(f"logits of router {i}", scores, expected.flatten(0, 1))
        expected = tensors.get(f"{name}.router_topk_idx_{i}")
        if expected is not None and not chosen.equal(expected.flatten(0, 1)):
            raise Difference(f"router {i} chooses other experts")


def cached_prefix(backend: TorchBackend, name: str, tensors: Tensors) -> None:
    """A block on the keys and values of what is before it, against a forward over everything."""
    canvas = given(tensors[f"{name}.input_ids"][0])
    length, prefix = len(canvas.tokens), int(tensors[f"{name}.prefix_len"])
    size = length - prefix
    whole = fed_logits(backend, [canvas], [ForwardSpan(0, length, None, length, size)])[0]
    compare("logits", whole, tensors[f"{name}.full_logits"][0])
    memory = KVSlot()
    fed_logits(backend, [canvas], [ForwardSpan(0, prefix, memory, prefix, size)])
    block = fed_logits(backend, [canvas], [ForwardSpan(prefix, length, memory, length, size)])[0]
    compare("logits of the block", block, tensors[f"{name}.block_logits_with_cache"][0])


class ByBeginning(dict[str, ForwardCheck]):
    """Finds a check by how a forward's name begins."""

    def __missing__(self, name: str) -> ForwardCheck:
        for start, check in self.items():
            if name.startswith(start):
                return check
        raise NotBuilt(f"forward {name}")


class LLaDA2Family(Family):
    """The folder. Both versions share a checkpoint; a case's origin says which one was recorded."""

    forwards: ClassVar[dict[str, ForwardCheck]] = ByBeginning({"block": blocks, "cached_prefix": cached_prefix})

    def _generate(self, case: dict[str, Any]) -> None:
        edits = "2.1" in case["origin"]
        known = LATEST if edits else {name: value for name, value in LATEST.items() if name not in EDITING}
        if unknown := set(case["params"]) - set(known):
            raise NotBuilt(f"parameters {', '.join(sorted(unknown))}")
        for cache in (CacheMode.NONE, CacheMode.PREFIX):
            try:
                self._replay(case, known | case["params"], edits, cache)
            except Difference as difference:
                raise Difference(f"cache {cache.value}: {difference}") from None

    def _replay(self, case: dict[str, Any], params: dict[str, Any], edits: bool, cache: CacheMode) -> None:
        (prompt,) = case["prompt"]
        length, end = params["block_length"], params["eos_id"]
        pattern = self.backend().info.pattern
        canvas = Canvas.blank(prompt, params["gen_length"], params["mask_id"], length, pattern=pattern)
        sampler, chosen = editing(params) if edits else schedule(params, canvas.layout.blocks)
        row = Row(canvas, sampler, sampler.Params(**chosen), cache=cache)
        predict = self._draws(case["manual_seed"], params)
        states: list[list[int]] = []
        output: list[int] | None = None
        block = row.block
        for ((_, event),) in run([row], predict):
            if event.error is not None:
                raise event.error
            states.append(canvas.tokens.tolist())
            if params["eos_early_stop"] and not edits and end in event.tokens:
                output = settled_text(canvas, end)
                if output is not None:
                    break
            closed = row.finished or row.block != block
            if closed and (params["eos_early_stop"] or not edits):
                done = canvas.generated[: canvas.layout.block_stop(block)]
                if bool((done == end).any()):
                    break
            block = row.block
        if output is None:
            output = row.told
            output = output[: output.index(end) + 1] if end in output else output
        self._compare(case, states, output, cut=canvas.layout.cut > 0 and row.finished)

    def _compare(self, case: dict[str, Any], states: list[list[int]], output: list[int], cut: bool) -> None:
        """Every forward has its state, also one that changes nothing.

        Where the text is cut the original goes on to fill what is cut off.
        """
        recorded = [state for (state,) in case["trajectory"]]
        for number, (ours, originals) in enumerate(zip(states, recorded, strict=False), start=1):
            if ours != originals:
                raise Difference(f"forward {number}: {ours}, not {originals}")
        if len(recorded) != case["nfe"] or len(states) > case["nfe"] or (len(states) < case["nfe"] and not cut):
            raise Difference(f"{len(states)} forwards, the original's nfe is {case['nfe']}")
        if [output] != case["output"]:
            raise Difference(f"the text is {output}, not {case['output'][0]}")

    def _draws(self, seed: int | None, params: dict[str, Any]) -> Predict:
        """What serves requests, but for tokens that the original draws for all of a block from one stream."""
        backend = self.backend()
        if not params["temperature"]:
            return backend.predict
        stream = stream_of(seed)
        if stream is None:
            raise NotBuilt("a temperature without a seed")
        args = {
            "temperature": params["temperature"],
            "top_k": params["top_k"] or 0,
            "top_p": 1.0 if params["top_p"] is None else params["top_p"],
        }

        @torch.inference_mode()
        def predict(query: Query) -> Prediction:
            (feed,) = query.spans
            assert feed.visible is not None
            logits = fed_logits(backend, query.canvases, query.spans)[0, -params["block_length"] :]
            token, confidence = draw(logits, args, stream)
            at = query.position - (feed.visible - params["block_length"])
            return Prediction(token[at], confidence[at], {})

        return predict


def settled_text(canvas: Canvas, end: int) -> list[int] | None:
    """What 2.0's early stop returns: everything up to the first end-of-text, if none of it is masked.

    One in the prompt counts as the first, and then nothing is returned.
    """
    first, prompt = canvas.tokens.tolist().index(end), canvas.layout.prompt_length
    stop = max(0, first - prompt)
    if bool(canvas.masked[:stop].any()):
        return None
    found: list[int] = canvas.tokens[prompt : first + 1].tolist()
    return found


def schedule(params: dict[str, Any], count: int) -> tuple[Sampler, dict[str, Any]]:
    """2.0's rule as our sampler: at least the step's quota, and all that is surer than the threshold.

    Args:
        count: of blocks; the original's steps are for one of them.
    """
    steps = min(params["steps"], params["gen_length"] // params["minimal_topk"]) * count
    if params["threshold"] >= 1:
        return get_sampler("topk"), {"steps": steps}
    return get_sampler("threshold"), {"steps": steps, "threshold": within_range(params["threshold"])}


def editing(params: dict[str, Any]) -> tuple[Sampler, dict[str, Any]]:
    """2.1's rule as our sampler."""
    return get_sampler("edit"), {
        "threshold": min(max(params["threshold"], 0.0), 1.0),
        "edit_threshold": min(max(params["editing_threshold"], 0.0), 1.0),
        "k": max(1, params["num_to_transfer"]),
        "max_post_steps": params["max_post_steps"],
    }
