"""Recorded calls of an original's selection, one after the other on one canvas, against runs of our loop."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers import AttentionPattern, Canvas, Layout, Sampler, TokenChoice, TokenChoices, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.statistics import StatisticsRequest
from samplers.forward.summary import choosable
from samplers.loop.row import Row
from tests.conformance.originals import InferCredit, InferThreshold, without_ban
from tests.conformance.replay import compare_states, distinct, replay
from tests.conformance.report import Difference

Tensors = dict[str, Tensor]
Say = Callable[[Tensor, StatisticsRequest], Prediction]


def rows_of(
    tokens: Tensor, mask_id: int, sampler: Sampler, params: dict[str, Any], start: int = 0, stop: int | None = None
) -> list[Row]:
    """Generations whose region is positions `start` to `stop` of each row, one block, masks where the mask token is."""
    stop = tokens.shape[1] if stop is None else stop
    layout = Layout(start, stop - start, stop - start, tokens.shape[1] - stop)
    return [
        Row(Canvas(layout, row.clone(), row[start:stop] == mask_id), sampler, sampler.Params(**params))
        for row in tokens
    ]


def run(rows: Sequence[Row], calls: Tensor, after: Tensor, say: Say = without_ban) -> int:
    """Replay with logits [calls, rows, region, vocab]; every state must be that of the record [calls, rows, length].

    Returns the number of forwards.
    """
    index = {id(row.canvas): i for i, row in enumerate(rows)}
    left = iter(calls)

    def predict(query: Query) -> Prediction:
        lines = torch.tensor([index[id(canvas)] for canvas in query.canvases])
        first = rows[0].canvas.layout.prompt_length
        return say(next(left)[lines[query.row], query.position - first], query.wanted)

    recording = replay(rows, predict, most=len(calls))
    for i, states in enumerate(recording.states):
        compare_states(distinct(states), after[:, i].tolist(), i)
    return max(len(states) for states in recording.states)


def infer_decoder(case: dict[str, Any], tensors: Tensors) -> None:
    """dInfer's decoders, called until nothing is left and after that for nothing."""
    args = case["args"]
    sampler: Sampler
    if case["name"].startswith("dinfer_decoder_threshold"):
        sampler, params = InferThreshold(args["mask_id"]), {"threshold": args["threshold"]}
    elif case["name"].startswith("dinfer_decoder_credit"):
        sampler = InferCredit(args["mask_id"])
        params = {
            "threshold": args["threshold"],
            "alpha": args["credit_alpha"],
            "gamma": args["boost_gamma"],
            "beta": args["decay_beta"],
        }
    else:
        sampler = get_sampler("hierarchy")
        params = {name: args[name] for name in ("threshold", "low_threshold")}
    rows = rows_of(tensors["in/x_start"], args["mask_id"], sampler, params, args["block_start"], args["block_end"])
    run(rows, tensors["in/logits_per_call"], tensors["out/x_after_each_call"])


def low_confidence(case: dict[str, Any], tensors: Tensors) -> None:
    """SGLang's: the last call finds every row done and only stores keys and values."""
    args = case["args"]
    rows = rows_of(tensors["in/input_ids"], args["mask_id"], get_sampler("threshold"), {"threshold": args["threshold"]})
    count_calls(rows, tensors)


def joint_threshold(case: dict[str, Any], tensors: Tensors) -> None:
    """SGLang's, which after its last post step makes one more call that changes nothing."""
    args = case["args"]
    params = {"threshold": args["threshold"], "edit_threshold": float(args["edit_threshold"])}
    params |= {"penalty": args["penalty_lambda"]} if "penalty_lambda" in args else {}
    params |= {"max_post_steps": args["max_post_edit_steps"]} if "max_post_edit_steps" in args else {}
    rows = rows_of(tensors["in/input_ids"], args["mask_id"], get_sampler("edit"), params)
    count_calls(rows, tensors, slack=1)


def count_calls(rows: list[Row], tensors: Tensors, slack: int = 0) -> None:
    after = tensors["out/input_ids_after_each_step"]
    calls = tensors["in/logits_per_step"].view(len(after), *after.shape[1:], -1)
    forwards = run(rows, calls, after)
    if not len(after) - 1 - slack <= forwards <= len(after) - 1:
        raise Difference(f"{forwards} forwards, the original needs {len(after) - 1}")


def strategy(args: dict[str, Any], quota: dict[str, int]) -> tuple[Sampler, dict[str, Any]]:
    """SDAR's and JetEngine's names for our samplers."""
    match args["remasking_strategy"]:
        case "sequential":
            return get_sampler("sequential"), dict(quota)
        case "low_confidence_static":
            return get_sampler("topk"), dict(quota)
        case "low_confidence_dynamic":
            bound = args.get("dynamic_threshold", args.get("confidence_threshold"))
            return get_sampler("threshold"), quota | {"threshold": bound}
        case "entropy_bounded":
            return get_sampler("entropy_bound"), {"gamma": args["eb_threshold"], "count_largest": True}
    raise Difference(f"no sampler of ours is {args['remasking_strategy']}")


def jet_engine(case: dict[str, Any], tensors: Tensors) -> None:
    """Greedy tokens, confidences and entropies of the plain distribution."""
    args = case["args"]
    sampler, params = strategy(args, {"k": args["num_transfer_tokens_per_step"]})
    rows = rows_of(tensors["in/block_start"][None], args["mask_token_id"], sampler, params)
    run(rows, tensors["in/logits_per_step"][:, None], tensors["out/block_after_each_step"][:, None])


def sdar(case: dict[str, Any], tensors: Tensors) -> None:
    """`block_diffusion_generate`: blocks counted from the prompt's start, tokens drawn with torch.multinomial."""
    args, prompt, calls = case["args"], tensors["in/prompt"][0], tensors["in/logits_per_call"]
    length = args["block_length"]
    generator = torch.Generator().manual_seed(case["manual_seed"])
    total = len(tensors["out/output"][0])
    canvas = torch.full((-(-total // length) * length,), args["mask_id"])
    canvas[: len(prompt)] = prompt
    left: Iterator[Tensor] = iter(calls)
    before = iter(tensors["out/block_before_each_denoise_call"])
    for start in range(len(prompt) // length * length, len(canvas), length):
        sampler, params = strategy(args, {"steps": args["denoising_steps"]})
        # A schedule counts the whole block, however many masks it begins with, where models are block-causal.
        layout = Layout(0, length, length, pattern=AttentionPattern(causal_block=length))
        tokens = canvas[start : start + length].clone()
        row = Row(Canvas(layout, tokens, tokens == args["mask_id"]), sampler, sampler.Params(**params))

        def predict(query: Query, row: Row = row) -> Prediction:
            if not row.canvas.tokens.equal(next(before)[0]):
                raise Difference(f"forward {row.forwards}: {row.canvas.tokens.tolist()}")
            token, confidence = draw(next(left)[0], args, generator)
            return Prediction(token[query.position], confidence[query.position], {})

        replay([row], predict)
        canvas[start : start + length] = row.canvas.tokens
    if not canvas[:total].equal(tensors["out/output"][0]):
        raise Difference(f"{canvas.tolist()}, not {tensors['out/output'][0].tolist()}")


def draw(logits: Tensor, args: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """SDAR's sampling: temperature, top-k, top-p, then a multinomial draw; confidence after the filters."""
    p = filtered(logits, args.get("temperature", 1.0), args.get("top_k", 0), args.get("top_p", 1.0))
    token = torch.multinomial(p, 1, generator=generator)
    return token[:, 0], p.gather(1, token)[:, 0]


def filtered(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities that temperature and filters leave, float32 [n, vocab]."""
    p, order = choosable(logits, TokenChoices.of([TokenChoice(temperature, top_p, top_k)] * len(logits)))
    p = p / p.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, order, p).float()


def dream_filtered(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """Dream's: top-p before top-k, and a temperature of 0 counts as 1."""
    p = filtered(logits, temperature or 1.0, 0, top_p)
    if not top_k:
        return p
    p = p * (filtered(logits, temperature or 1.0, top_k, 1.0) > 0)
    return p / p.sum(dim=-1, keepdim=True)
