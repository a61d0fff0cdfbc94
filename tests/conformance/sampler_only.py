"""Selection functions of the originals on recorded logits, against our samplers in one step of our loop."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samplers import Canvas, Layout, Sampler, Step, get_sampler
from samplers.columns import Columns, LayoutColumns
from samplers.contract import CanvasReader
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import run
from samplers.schedule import ScheduledParams, quota
from tests.conformance.decoders import (
    dream_filtered,
    filtered,
    infer_decoder,
    jet_engine,
    joint_threshold,
    low_confidence,
    rows_of,
    sdar,
)
from tests.conformance.originals import InferThreshold, MostUncertain, ReleasedFactor, gumbel, stream_of, without_ban
from tests.conformance.report import Difference, NotBuilt

TABLES = ("num_transfer_tokens_table", "sdar_num_transfer_tokens_table")
FACTOR = ReleasedFactor()
LEAST = torch.finfo(torch.float64).tiny
"""Stands for a threshold of 0, which ours refuse because it means to commit everything."""

Check = Callable[[], None]


class SamplerOnly:
    """The folder: `cases.json`, `tensors.safetensors` and two schedule tables. It has no model: all engines are one."""

    def __init__(self, folder: Path, engine: str = "torch") -> None:
        self.cases: dict[str, Any] = json.loads((folder / "cases.json").read_text())
        self._folder = folder
        self._tensors = load_file(folder / "tensors.safetensors")

    def checks(self) -> Iterator[tuple[str, Check]]:
        """Name and check of every case."""
        for table in TABLES:
            yield table, lambda table=table: self._schedule(table)  # type: ignore[misc]
        for case in self.cases["cases"]:
            yield case["name"], lambda case=case: self._case(case)  # type: ignore[misc]

    def close(self) -> None:
        """There is no model to give back."""

    def _schedule(self, table: str) -> None:
        """Candidates per step of our schedule, for every number of masks and steps."""
        for masks, steps, expected in json.loads((self._folder / f"{table}.json").read_text())["rows"]:
            found = schedule(masks, steps)
            if found != expected:
                raise Difference(f"{masks} masks in {steps} steps: {found}, the original has {expected}")

    def _case(self, case: dict[str, Any]) -> None:
        name = case["name"]
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): value for key, value in self._tensors.items() if key.startswith(prefix)}
        for start, check in CHECKS.items():
            if name.startswith(start):
                check(case | {"mask_id": self.cases["mask_id"]}, tensors)
                return
        raise NotBuilt(case["function"].partition("(")[0])


def noise(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The noise that seeded replays add, and the token that ours chooses under it."""
    logits, temperature = tensors["in/logits"], case["args"]["temperature"]
    noised = gumbel(logits, temperature, stream_of(case["manual_seed"]))
    if not torch.allclose(noised.double(), tensors["out/noised"].double(), rtol=1e-9, atol=0):
        raise Difference("the noised logits differ")
    # A logarithm keeps the order, and brings the scores back into the range of logits.
    scores = noised.log() if temperature else noised
    token = without_ban(scores.flatten(0, 1)).token.view(scores.shape[:2])
    if not token.equal(tensors["out/argmax"]):
        raise Difference("the chosen tokens differ")


def transfer(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One call of `get_transfer_index`: one step of our loop."""
    args, masked = case["args"], tensors["in/mask_index"]
    stream = stream_of(case["manual_seed"])
    logits = tensors["in/logits"]
    noised = gumbel(logits, args["temperature"], stream)
    draw = None
    if "random" in (args.get("remasking"), args.get("target")):
        kind = torch.float64 if "2026-01" in case["name"] else torch.float32
        draw = torch.rand(logits.shape[:2], dtype=kind, generator=stream)

    asked: list[tuple[Query, Prediction]] = []

    def predict(query: Query) -> Prediction:
        asked.append((query, say(query)))
        return asked[-1][1]

    def say(query: Query) -> Prediction:
        at = members[query.row], query.position
        found = without_ban(logits[at], query.wanted)
        if args["temperature"]:
            token = noised[at].argmax(dim=-1)
            found = replace(found, token=token, confidence=logits[at].softmax(dim=-1).gather(1, token[:, None])[:, 0])
        return found if draw is None else replace(found, confidence=draw[at])

    # A row without masks, or with nothing to transfer, takes no step with us.
    free = "factor" in args or args.get("threshold") is not None
    quotas = None if free else tensors.get("in/num_transfer_tokens")
    members = masked.any(dim=1).nonzero()[:, 0] if quotas is None else quotas.nonzero()[:, 0]
    rows = []
    for i in members.tolist():
        sampler, params = chosen(case, None if quotas is None else int(quotas[i]))
        layout = Layout(0, masked.shape[1], masked.shape[1])
        canvas = Canvas(layout, tensors["in/x"][i].clone(), masked[i].clone())
        canvas.masked[args.get("block_end", masked.shape[1]) :] = False
        rows.append(Row(canvas, sampler, sampler.Params(**params)))
    committed = torch.zeros_like(masked)
    for i, (_, event) in zip(members.tolist(), next(run(rows, predict, may_wait=True)), strict=True):
        if event.error is not None:
            raise event.error
        committed[i, event.positions] = True
    ((query, prediction),) = asked
    tokens = tensors["in/x"].clone()
    tokens[members[query.row], query.position] = prediction.token
    masked = masked & (torch.arange(masked.shape[1]) < args.get("block_end", masked.shape[1]))
    at = masked & torch.isin(torch.arange(len(masked)), members)[:, None]
    if not tokens[at].equal(tensors["out/x0"][at]):
        raise Difference("the chosen tokens differ")
    scores = torch.full(masked.shape, -torch.inf, dtype=torch.float64)
    scores[members[query.row], query.position] = prediction.confidence.double()
    compare_selection(committed, tensors["out/transfer_index"], scores)


def remask(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One step that also opens what was committed: the original says so by a mask token among its choices."""
    args, mask_id = case["args"], case["mask_id"]
    sampler = get_sampler("hierarchy_remask")
    params = {"threshold": args["threshold"], "low_threshold": args["low_threshold"]}
    rows = rows_of(tensors["in/x"], mask_id, sampler, params | {"remask_below": args["remask_threshold"]})
    for row in rows:
        row.given[:] = False

    def predict(query: Query) -> Prediction:
        return without_ban(tensors["in/logits"][query.row, query.position], query.wanted)

    for _, event in next(run(rows, predict)):
        if event.error is not None:
            raise event.error
    expected = torch.where(tensors["out/transfer_index"], tensors["out/x0"], tensors["in/x"])
    ours = torch.stack([row.canvas.tokens for row in rows])
    if not ours.equal(expected):
        raise Difference(f"{ours.tolist()}, not {expected.tolist()}")


def chosen(case: dict[str, Any], count: int | None) -> tuple[Sampler, dict[str, Any]]:
    """Our sampler for a selection function, with its parameters."""
    args = case["args"]
    if "factor" in args:
        return FACTOR, {"factor": args["factor"]}
    if "low_threshold" in args:
        return get_sampler("hierarchy"), {name: args[name] for name in ("threshold", "low_threshold")}
    if case["name"].startswith("dinfer_get_transfer_index_threshold"):
        return InferThreshold(case["mask_id"]), {"threshold": args["threshold"]}
    bound = args.get("threshold")
    if args.get("target") == "margin_confidence":
        return get_sampler("margin"), {"k": count} if bound is None else {"threshold": bound}
    if args.get("target") == "neg_entropy":
        return MostUncertain(), {"k": count} if bound is None else {"threshold": -bound}
    if bound is None:
        return get_sampler("topk"), {"k": count}
    return get_sampler("threshold"), {"threshold": max(bound, LEAST), "k": args.get("minimal_topk")}


def sample(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Dream's and SDAR's token choice: the token drawn with torch's generator, and how sure it is of its kind."""
    args, logits = case["args"], tensors["in/logits"].flatten(0, -2)
    temperature, top_p, top_k = args.get("temperature", 0.0), args.get("top_p", 1.0), args.get("top_k", 0)
    if case["name"].startswith("sdar"):
        p = filtered(logits, temperature, top_k, top_p)
    else:
        p = dream_filtered(logits, temperature, top_p, top_k)
    with torch.random.fork_rng(devices=[]):
        if case["manual_seed"] is not None:
            torch.manual_seed(case["manual_seed"])
        drawn = torch.multinomial(p, 1)[:, 0] if temperature else without_ban(logits).token
    expected = tensors["out/x0"].flatten()
    if not drawn.equal(expected):
        raise Difference(f"tokens {drawn.tolist()}, the original has {expected.tolist()}")
    kind = args.get("tar") or next((name for name in ("margin_confidence", "neg_entropy") if args.get(name)), "")
    two = p.topk(2, dim=-1).values
    score = {
        "margin_confidence": two[:, 0] - two[:, 1],
        "neg_entropy": -torch.special.entr(p).sum(dim=-1),
    }.get(kind, p.gather(1, drawn[:, None])[:, 0])
    name = next(name for name in ("out/confidence", "out/x0_p", "out/target") if name in tensors)
    if not torch.allclose(score, tensors[name].flatten(), rtol=1e-5, atol=1e-6):
        raise Difference(f"{kind or 'confidence'} differs by {(score - tensors[name].flatten()).abs().max():.2e}")


def filters(case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Dream's top-p and top-k: which tokens are left."""
    args, logits = case["args"], tensors["in/logits"].flatten(0, -2)
    left = filtered(logits, 1.0, args.get("top_k", 0), args.get("top_p", 1.0)) > 0
    expected = tensors["out/logits"].flatten(0, -2) > torch.finfo(torch.float32).min
    if not left.equal(expected):
        raise Difference(f"{int((left != expected).sum())} tokens are filtered differently")


def schedule(masks: int, steps: int) -> list[int]:
    """What our schedule commits in each step of a block of so many masks."""

    def counter(value: int | None) -> Tensor:
        return torch.arange(steps)[:, None] if value is None else torch.full((steps, 1), value)

    width = max(masks, 1)
    grid = torch.ones(steps, width, dtype=torch.bool)
    size, none = counter(width), counter(0)
    params = [ScheduledParams(steps=steps)] * steps
    step = Step(
        candidate=grid,
        masked=grid,
        committed=~grid,
        position=torch.arange(width).expand(steps, width),
        seed=none,
        forward=counter(None),
        block=none,
        block_start=none,
        block_step=counter(None),
        block_masks=counter(masks),
        slot=none,
        layout=LayoutColumns(size, none, size, size, counter(1), size, none, none > 0),
        params=params,
        columns=Columns.of(params),
        state={},
        canvas=CanvasReader(grid.long(), counter(None)),
        token=grid.long(),
        confidence=grid.float(),
        extra={},
    )
    found: list[int] = quota(step)[:, 0].tolist()
    return found


def compare_selection(ours: Tensor, originals: Tensor, scores: Tensor) -> None:
    """Selected positions [rows, width]; among positions of equal score only their number has to agree."""
    for row, (got, want, score) in enumerate(zip(ours, originals, scores, strict=True)):
        for value in score[got | want].unique():
            tied = score == value
            if int((got & tied).sum()) != int((want & tied).sum()):
                raise Difference(f"row {row}: {got.nonzero()[:, 0].tolist()}, not {want.nonzero()[:, 0].tolist()}")


CHECKS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], None]] = {
    "llada_add_gumbel_noise": noise,
    "fast_": transfer,
    "dllm_rl_get_transfer_index": transfer,
    "dinfer_get_transfer_index": transfer,
    "dinfer_hierarchy_fast": transfer,
    "dinfer_hierarchy_remask": remask,
    "dinfer_cache": transfer,
    "dinfer_decoder": infer_decoder,
    "dream_sample": sample,
    "dllm_rl_dream_sample": sample,
    "sdar_sample": sample,
    "dream_top": filters,
    "sdar_select": sdar,
    "jetengine": jet_engine,
    "sglang_LowConfidence": low_confidence,
    "sglang_JointThreshold": joint_threshold,
}
