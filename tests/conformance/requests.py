"""Recorded calls of the originals as requests to the API, with the recording's own numbers.

Nothing is rounded, no quota is made up: what a user would write who wants what the original gave.
"""

from dataclasses import dataclass, field
from typing import Any

Case = dict[str, Any]
Fields = dict[str, Any]
Tokens = list[int]


class NotExpressible(Exception):
    """Why no request asks for what was recorded, in words for a user."""


@dataclass(frozen=True)
class Asked:
    """A request, and what the original answered.

    Attributes:
        outputs: generated tokens, one list a prompt.
        settings: entries of `config.json` that stand for arguments of the original's.
        whole: whether the original counts tokens as `max_tokens` does, so that the answers are equally long.
    """

    body: Fields
    outputs: list[Tokens]
    settings: dict[str, Any] = field(default_factory=dict)
    whole: bool = True


SEEDED = "its random numbers are torch's global ones, whose order of use is no part of a text's meaning"
CACHES = {
    "generate": "none",
    "generate_with_prefix_cache": "prefix",
    "generate_with_dual_cache": "dual",
}


def express(family: str, case: Case) -> Asked:
    """The request of a recorded case. Raises NotExpressible."""
    return {
        "llada": of_llada,
        "llada_moe": of_llada,
        "llada2": of_llada2,
        "dream": of_dream,
        "sdar": of_sdar,
        "fast_dllm_v2": of_fast_dllm,
        "dinfer": of_dinfer,
    }[family](case)


def asked(prompts: list[Tokens], max_tokens: int, ends: Tokens, **fields: Any) -> Fields:
    """What all requests have in common: the recording's end-of-text in place of the checkpoint's."""
    return {
        "prompt": prompts,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stop_token_ids": ends,
        "fill_after_end": False,
        "return_trajectory": True,
    } | fields


def unpadded(case: Case) -> tuple[list[Tokens], list[Tokens]]:
    """Prompts and outputs without what the original pads at the left."""
    cuts = [row.index(1) for row in case.get("attention_mask") or [[1]] * len(case["prompt"])]
    prompts = [prompt[cut:] for prompt, cut in zip(case["prompt"], cuts, strict=True)]
    outputs = [output[len(prompt) :] for output, prompt in zip(case["output"], case["prompt"], strict=True)]
    return prompts, outputs


def of_llada(case: Case) -> Asked:
    """LLaDA's `generate`, and Fast-dLLM's variants with caches, thresholds and factors."""
    params = case["params"]
    refuse_random(case)
    for name in ("logits_eos_inf", "confidence_eos_eot_inf"):
        if params.get(name):
            raise NotExpressible(f"requests have no {name}")
    if "leftover_masks" in case["name"]:
        raise NotExpressible("the original gives a block up after its share of steps and returns masks")
    sampler: Fields
    if "threshold" in params:
        sampler = {"sampler": "threshold", "sampler_params": {"threshold": params["threshold"]}}
    elif "factor" in params:
        raise NotExpressible("its scan takes the last candidate whether that passed or failed; ours is the paper's")
    else:
        sampler = {"sampler": "topk", "sampler_params": {"steps": params["steps"]}}
    prompts, outputs = unpadded(case)
    fields = sampler | {"block_length": params["block_length"], "cache": CACHES[case["function"]]}
    if params.get("cfg_scale"):
        fields["modifiers"] = [{"name": "guidance", "params": {"scale": params["cfg_scale"]}}]
    return Asked(asked(prompts, params["gen_length"], [], **fields), outputs)


def of_llada2(case: Case) -> Asked:
    """2.0 commits above a threshold and at least its schedule's number, 2.1 edits too; both stop at `eos_id`."""
    params = case["params"]
    refuse_random(case)
    length, threshold = params["block_length"], params["threshold"]
    if "2.1" in case["origin"]:
        chosen: Fields = {
            "threshold": threshold,
            "edit_threshold": params.get("editing_threshold", 0.9),
            "k": params.get("num_to_transfer", 1),
            "max_post_steps": params.get("max_post_steps", 16),
        }
        fields: Fields = {"sampler": "edit", "sampler_params": chosen}
    else:
        steps = min(params["steps"], params["gen_length"] // params.get("minimal_topk", 1))
        # A schedule counts positions of a block, given ones among them: so many a forward, where that comes out even.
        number = {"k": length // steps} if length % steps == 0 else {"steps": steps * blocks(case, length)}
        fields = {"sampler": "threshold", "sampler_params": {"threshold": threshold, **number}}
    body = asked(case["prompt"], params["gen_length"], [params["eos_id"]], block_length=length, **fields)
    return Asked(body, case["output"])


def blocks(case: Case, length: int) -> int:
    """Blocks that have masks: they are counted from the prompt's start."""
    (prompt,) = case["prompt"]
    stop: int = len(prompt) + case["params"]["gen_length"]
    return -(-stop // length) - len(prompt) // length


def of_sdar(case: Case) -> Asked:
    """`block_diffusion_generate`: greedy by `top_k` 1 only, for which there is nothing random about it."""
    params = case["params"]
    if params.get("top_k") != 1:
        raise NotExpressible(SEEDED)
    number = {"k": params["block_length"] // params["denoising_steps"]}
    match params["remasking_strategy"]:
        case "sequential":
            fields: Fields = {"sampler": "sequential", "sampler_params": number}
        case "low_confidence_dynamic":
            chosen = number | {"threshold": params["confidence_threshold"]}
            fields = {"sampler": "threshold", "sampler_params": chosen}
        case other:
            raise NotExpressible(f"{other} with top_k 1 chooses among equals")
    fields |= {"temperature": params["temperature"], "top_k": 1, "block_length": params["block_length"]}
    body = asked(case["prompt"], params["gen_length"], params.get("stopping_criteria_idx") or [], **fields)
    (prompt,), (output,) = case["prompt"], case["output"]
    return Asked(body, [output[len(prompt) :][: params["gen_length"]]])


def of_fast_dllm(case: Case) -> Asked:
    """Fast-dLLM v2: small blocks inside the model's, of which the original counts whole ones and adds a token."""
    params = case["params"]
    refuse_random(case)
    if len(case["prompt"]) > 1 and params.get("use_block_cache"):
        raise NotExpressible("the rows of its batch share the decision when what a block keeps is computed again")
    body = asked(
        [prompt[:length] for prompt, length in zip(case["prompt"], lengths(case), strict=True)],
        params["max_new_tokens"],
        [params["stop_token"]],
        sampler="threshold",
        sampler_params={"threshold": params["threshold"]},
        block_length=params["small_block_size"],
        cache="dual" if params.get("use_block_cache") else "prefix",
    )
    outputs = [output[length:] for output, length in zip(case["output"], lengths(case), strict=True)]
    pad, stop = params.get("pad_token_id"), params["stop_token"]
    outputs = [output[: output.index(stop) + 1] if stop in output and pad is not None else output for output in outputs]
    return Asked(body, outputs, {"bd_size": params["block_size"]}, whole=False)


def lengths(case: Case) -> list[int]:
    found: list[int] = case.get("seq_len") or [len(prompt) for prompt in case["prompt"]]
    return found


def of_dream(case: Case) -> Asked:
    """Dream's `diffusion_generate`, and Fast-dLLM's with its caches."""
    params, cached = case["params"], "generation_utils_block" in case["origin"]
    if params["alg"] == "origin" or params.get("alg_temp"):
        raise NotExpressible(SEEDED)
    refuse_random(case)
    if params["alg"] == "confidence_threshold" and not cached:
        raise NotExpressible("no rule takes at most its share of candidates above a threshold")
    fields: Fields
    if params["alg"] == "confidence_threshold":
        fields = {"sampler": "threshold", "sampler_params": {"threshold": params["threshold"]}}
    else:
        chosen = {"alg": params["alg"], "steps": params["steps"]}
        chosen |= {"eps": params["eps"]} if "eps" in params else {}
        fields = {"sampler": "dream", "sampler_params": chosen}
    if cached:
        fields |= {"block_length": params["block_length"], "cache": "dual" if params["dual_cache"] else "prefix"}
    # Where a call names none, transformers' default holds, and what is sure is judged among those alone.
    fields["top_k"] = params.get("top_k", 50) or 0
    prompts, outputs = unpadded(case)
    return Asked(asked(prompts, params["max_new_tokens"], [], **fields), outputs)


def of_dinfer(case: Case) -> Asked:
    """dInfer's decoders; after the block that has an end-of-text the original stops."""
    if case["llm"]["class"] != "BlockWiseDiffusionLLM":
        raise NotExpressible("no cache keeps the vicinity of a block")
    if case["start_block_align"]:
        raise NotExpressible("a LLaDA request's first block begins after the prompt")
    names = {"credit_alpha": "alpha", "boost_gamma": "gamma", "decay_beta": "beta"}
    decoder = case["decoder"]
    chosen = {names.get(k, k): v for k, v in decoder.items() if k not in ("class", "temperature")}
    sampler = {
        "ThresholdParallelDecoder": "threshold",
        "CreditThresholdParallelDecoder": "credit",
        "HierarchyDecoder": "hierarchy",
    }[decoder["class"]]
    (prompt,), (canvas,) = case["prompt"], case["canvas_final"]
    end = case["eos_id"]
    output = canvas[len(prompt) :]
    output = output[: output.index(end) + 1] if end in output else output
    body = asked(
        [prompt],
        case["gen_length"],
        [end],
        sampler=sampler,
        sampler_params=chosen,
        block_length=case["block_length"],
        cache=case["cache"] or "none",
    )
    return Asked(body, [output])


def refuse_random(case: Case) -> None:
    """Raises NotExpressible for what is drawn."""
    if case["params"].get("temperature") or case["params"].get("remasking") == "random":
        raise NotExpressible(SEEDED)
