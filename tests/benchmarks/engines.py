"""The same loop on the torch and on the vllm engine: steps and tokens a second, and what crosses to vLLM's processes.

Run where vLLM is: python -m tests.benchmarks.engines [--model DIR] [--load-format dummy] [--rounds 7]
    [--threads 1] [--json FILE]
Both engines are started once and take turns; each number is the median of its rounds, each ratio the median of the
ratios within a round. A step is one forward of one canvas. Word problems of the embedded model's kind are answered in
full diffusion, `topk` with 32 steps of 2 tokens, so that both engines make equally many forwards.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policies.tasks import get_task
from samplers import Canvas, Statistic, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import LoadedModel, load_model
from server.backends.vllm.backend import VllmBackend
from server.bench.machine import in_words, machine
from server.engine import Backend

CONCURRENT = (1, 8, 16)
GEN_LENGTH, STEPS = 64, 32


@dataclass
class Traffic:
    """Bytes to and from vLLM's engine process, counted where they are encoded and decoded."""

    sent: int = 0
    received: int = 0

    def watch(self, backend: VllmBackend) -> None:
        client = backend._engine.engine_core
        encode, decode = client.encoder.encode, client.decoder.decode

        def encoded(message: Any) -> Any:
            frames = encode(message)
            self.sent += sum(memoryview(frame).nbytes for frame in frames)
            return frames

        def decoded(frames: Any) -> Any:
            each = [frames] if isinstance(frames, bytes | bytearray | memoryview) else frames
            self.received += sum(memoryview(frame).nbytes for frame in each)
            return decode(frames)

        client.encoder.encode, client.decoder.decode = encoded, decoded


def rows(loaded: LoadedModel, count: int, sampler_name: str) -> list[Row]:
    problems = get_task("chain").problems(count, 0, "heldout")
    sampler = get_sampler(sampler_name)
    params = sampler.Params(steps=STEPS) if "steps" in sampler.Params.model_fields else sampler.Params()
    mask_id = loaded.backend.info.mask_id
    return [
        Row(Canvas.blank(loaded.text.encode(each.prompt), GEN_LENGTH, mask_id), sampler, params, seed=i)
        for i, each in enumerate(problems)
    ]


def timed(backend: Backend, work: list[Row]) -> tuple[float, int]:
    """Seconds, and forwards of all canvases."""
    began = time.perf_counter()
    finish(work, backend.predict)
    return time.perf_counter() - began, sum(row.forwards for row in work)


def compare(models: dict[str, LoadedModel], count: int, rounds: int) -> dict[str, Any]:
    """Both engines in turns."""
    steps: dict[str, list[float]] = {name: [] for name in models}
    forwards = {}
    for turn in range(rounds + 1):
        for name, loaded in models.items():
            seconds, forwards[name] = timed(loaded.backend, rows(loaded, count, "topk"))
            if turn:  # the first one warms up
                steps[name].append(forwards[name] / seconds)
    assert len(set(forwards.values())) == 1, f"the engines made different numbers of forwards: {forwards}"
    ratios = [v / t for t, v in zip(steps["torch"], steps["vllm"], strict=True)]
    per_step = count * GEN_LENGTH / forwards["torch"]
    return {
        "concurrent": count,
        **{f"{name}_steps_per_second": statistics.median(found) for name, found in steps.items()},
        **{f"{name}_tokens_per_second": per_step * statistics.median(found) for name, found in steps.items()},
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def crossing(loaded: LoadedModel, traffic: Traffic) -> list[dict[str, Any]]:
    """Bytes of a step with samplers of small and large wishes, against those of full logits of the same positions."""
    found = []
    for name in ("topk", "entropy", "credit"):
        work = rows(loaded, 1, name)
        asked = 0

        def predict(query: Any) -> Any:
            nonlocal asked
            asked += len(query.row)
            return loaded.backend.predict(query)

        traffic.sent = traffic.received = 0
        finish(work, predict)
        forwards = work[0].forwards
        found.append(
            {
                "sampler": name,
                "statistics": sorted(get_sampler(name).statistics & frozenset(Statistic)),
                "sent": traffic.sent / forwards,
                "received": traffic.received / forwards,
                "full_logits": 4 * loaded.backend.info.vocab_size * asked / forwards,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = {
        name: load_model(arguments.model, name, device="cpu", dtype="float32", load_format=arguments.load_format)
        for name in ("torch", "vllm")
    }
    vllm = models["vllm"].backend
    assert isinstance(vllm, VllmBackend)
    traffic = Traffic()
    traffic.watch(vllm)
    try:
        speed = [compare(models, count, arguments.rounds) for count in CONCURRENT]
        bytes_of_a_step = crossing(models["vllm"], traffic)
    finally:
        vllm.close()
    info = vllm.info
    print(in_words(machine()))
    print(
        f"{models['vllm'].name}: {info.parameters:,} weights, vocabulary {info.vocab_size}, {arguments.rounds} rounds"
    )
    print("concurrent  torch steps/s  tokens/s   vllm steps/s  tokens/s   vllm/torch (lowest, highest)")
    for row in speed:
        print(
            f"{row['concurrent']:>10}  {row['torch_steps_per_second']:>13.1f}  {row['torch_tokens_per_second']:>8.1f}"
            f"  {row['vllm_steps_per_second']:>13.1f}  {row['vllm_tokens_per_second']:>8.1f}"
            f"   {row['ratio']:.2f} ({row['low']:.2f}, {row['high']:.2f})"
        )
    print("bytes of a step of one canvas, to vLLM and back, and of full logits at the same positions")
    for row in bytes_of_a_step:
        print(f"{row['sampler']:>10}  {row['sent']:>8.0f}  {row['received']:>8.0f}  {row['full_logits']:>10.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"speed": speed, "bytes": bytes_of_a_step}, indent=1))


if __name__ == "__main__":
    main()
