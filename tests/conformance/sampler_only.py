"""Selection functions of the originals on recorded logits, against our samplers in one step of our loop."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samplers import Canvas, Layout, Sampler, Step, get_sampler
from samplers.denoising import Denoising, Query, advance, ask
from samplers.prediction import Prediction
from samplers.schedule import ScheduledParams, quota
from tests.conformance.originals import ReleasedFactor, gumbel, stream_of, without_ban
from tests.conformance.replay import compare_states, replay
from tests.conformance.report import Difference, NotBuilt

TABLES = ("num_transfer_tokens_table", "sdar_num_transfer_tokens_table")
FACTOR = ReleasedFactor()
LEAST = torch.finfo(torch.float64).tiny
"""Stands for a threshold of 0, which ours refuse because it means to commit everything."""

Check = Callable[[], None]


class SamplerOnly:
    """The folder: `cases.json`, `tensors.safetensors` and two schedule tables."""

    def __init__(self, folder: Path) -> None:
        self.cases: dict[str, Any] = json.loads((folder / "cases.json").read_text())
        self._folder = folder
        self._tensors = load_file(folder / "tensors.safetensors")

    def checks(self) -> Iterator[tuple[str, Check]]:
        """Name and check of every case."""
        for table in TABLES:
            yield table, lambda table=table: self._schedule(table)  # type: ignore[misc]
        for case in self.cases["cases"]:
            yield case["name"], lambda case=case: self._case(case)  # type: ignore[misc]

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
        if name.startswith("llada_add_gumbel_noise"):
            self._noise(case, tensors)
        elif name.startswith(("fast_20", "fast_dynamic")) or case["args"].get("target") in ("confidence", "random"):
            self._transfer(case, tensors)
        elif name.startswith("sglang_LowConfidence"):
            self._block(case, tensors)
        else:
            raise NotBuilt(case["function"].partition("(")[0])

    def _noise(self, case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
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

    def _transfer(self, case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """One call of `get_transfer_index`: one step of our loop."""
        args, masked = case["args"], tensors["in/mask_index"]
        stream = stream_of(case["manual_seed"])
        logits = tensors["in/logits"]
        noised = gumbel(logits, args["temperature"], stream)
        draw = None
        if "random" in (args.get("remasking"), args.get("target")):
            kind = torch.float64 if "2026-01" in case["name"] else torch.float32
            draw = torch.rand(logits.shape[:2], dtype=kind, generator=stream)

        def predict(query: Query) -> Prediction:
            at = members[query.row], query.position
            if args["temperature"] == 0:
                found = without_ban(logits[at])
            else:
                token = noised[at].argmax(dim=-1)
                found = Prediction(token, logits[at].softmax(dim=-1).gather(1, token[:, None])[:, 0], {})
            return found if draw is None else Prediction(found.token, draw[at], {})

        # A row without masks, or with nothing to transfer, takes no step with us.
        free = "factor" in args or args["threshold"] is not None
        quotas = None if free else tensors.get("in/num_transfer_tokens")
        members = masked.any(dim=1).nonzero()[:, 0] if quotas is None else quotas.nonzero()[:, 0]
        rows = []
        for i in members.tolist():
            sampler: Sampler
            if "factor" in args:
                sampler = FACTOR
                params = sampler.Params(factor=args["factor"])
            elif quotas is None:
                sampler = get_sampler("threshold")
                params = sampler.Params(threshold=max(args["threshold"], LEAST))
            else:
                sampler = get_sampler("topk")
                params = sampler.Params(k=int(quotas[i]))
            layout = Layout(0, masked.shape[1], masked.shape[1])
            rows.append(Denoising(Canvas(layout, tensors["in/x"][i].clone(), masked[i].clone()), sampler, params))
        query = ask(rows)
        prediction = predict(query)
        committed = torch.zeros_like(masked)
        for i, outcome in zip(members.tolist(), advance(rows, query, prediction), strict=True):
            committed[i, outcome.positions] = True
        tokens = tensors["in/x"].clone()
        tokens[members[query.row], query.position] = prediction.token
        at = masked & torch.isin(torch.arange(len(masked)), members)[:, None]
        if not tokens[at].equal(tensors["out/x0"][at]):
            raise Difference("the chosen tokens differ")
        scores = torch.full(masked.shape, -torch.inf, dtype=torch.float64)
        scores[members[query.row], query.position] = prediction.confidence.double()
        compare_selection(committed, tensors["out/transfer_index"], scores)

    def _block(self, case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Calls until all rows are done, each with logits of its own: a run of our loop."""
        start, per_call = tensors["in/input_ids"], tensors["in/logits_per_step"]
        after = tensors["out/input_ids_after_each_step"]
        count, size = start.shape
        sampler = get_sampler("threshold")
        params = sampler.Params(threshold=case["args"]["threshold"])
        rows = [
            Denoising(Canvas(Layout(0, size, size), tokens.clone(), tokens == self.cases["mask_id"]), sampler, params)
            for tokens in start
        ]
        index = {id(row.canvas): i for i, row in enumerate(rows)}
        calls = iter(per_call)

        def predict(query: Query) -> Prediction:
            lines = torch.tensor([index[id(canvas)] for canvas in query.canvases])
            return without_ban(next(calls).view(count, size, -1)[lines[query.row], query.position])

        recording = replay(rows, predict)
        for i, states in enumerate(recording.states):
            compare_states(states, after[:, i].tolist(), i)
        # The original's last call finds every row done and only stores keys and values.
        forwards = max(len(states) for states in recording.states)
        if forwards != len(after) - 1:
            raise Difference(f"{forwards} forwards, the original needs {len(after) - 1}")


def schedule(masks: int, steps: int) -> list[int]:
    """What our schedule commits in each step of a block of so many masks."""

    def counter(value: int | None) -> Tensor:
        return torch.arange(steps)[:, None] if value is None else torch.full((steps, 1), value)

    grid = torch.ones(steps, max(masks, 1), dtype=torch.bool)
    step = Step(
        candidate=grid,
        masked=grid,
        token=grid.long(),
        confidence=grid.float(),
        extra={},
        params=[ScheduledParams(steps=steps)] * steps,
        layouts=[Layout(0, max(masks, 1), max(masks, 1))] * steps,
        seed=counter(0),
        forward=counter(None),
        block=counter(0),
        block_step=counter(None),
        block_masks=counter(masks),
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
