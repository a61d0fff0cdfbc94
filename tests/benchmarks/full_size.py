"""A configuration of a published shape with random weights: memory, time of a forward, and where it goes.

python -m tests.benchmarks.full_size [--engine torch|vllm] [--dtype float32|bfloat16] [--layers 12] [--width 768]
By default LLaDA-8B's vocabulary and proportions at about 290 M weights; `--layers 32 --width 4096` is LLaDA-8B itself.
What is measured is loaded with `--load-format dummy`. Bare matrix products of the same shapes alternate with forwards.
"""

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from samplers import Canvas, get_sampler
from samplers.forward.query import Query
from samplers.forward.summary import summarise
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.loading import find_model, load_model
from server.backends.torch.backend import TorchBackend
from server.bench.machine import in_words, machine
from server.bench.products import bare_products
from server.bench.results import timed
from server.engine import Backend
from server.models.families.llada import LLaDA

LENGTH, BLOCK = 128, 32


def write_config(folder: Path, layers: int, width: int) -> None:
    """LLaDA-8B's configuration at this depth and width, with the embedded model's tokenizer."""
    heads = width // 64 if width < 4096 else width // 128
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": width,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": heads,
        "mlp_hidden_size": 3 * width,
        "vocab_size": 126464,
        "embedding_size": 126464,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _, source = find_model(None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)


def first_step(backend: Backend, count: int) -> Query:
    """Prompts of three quarters of the canvas, and the rest masked."""
    topk = get_sampler("topk")
    canvases = [Canvas.blank([5] * (LENGTH - BLOCK), BLOCK, backend.info.mask_id) for _ in range(count)]
    return next_query([Row(canvas, topk, topk.Params()) for canvas in canvases])


def parts(backend: TorchBackend, count: int, rounds: int) -> str:
    """One line: a forward of so many rows, shares of head and statistics, and its products alone."""
    query, network = first_step(backend, count), backend.network
    assert isinstance(network, LLaDA)
    batch, back = backend.pack(query)
    dtype = getattr(torch, backend.info.dtype)
    bare, operations = bare_products(network.config, len(batch.tokens), len(batch.wanted), dtype)
    found: dict[str, list[float]] = {name: [] for name in ("whole", "head", "statistics", "bare")}
    with torch.inference_mode():
        hidden = network.packed(batch)[back]
        logits = network.head(hidden)
        for turn in range(rounds + 1):
            times = {
                "whole": timed(lambda: backend.predict(query))(),
                "head": timed(lambda: network.head(hidden))(),
                "statistics": timed(lambda: summarise(logits, backend.info.mask_id))(),
                "bare": timed(bare)(),
            }
            if turn:
                for name, value in times.items():
                    found[name].append(value)
    whole, head, said, alone = (statistics.median(found[name]) for name in ("whole", "head", "statistics", "bare"))
    return (
        f"{count:>4} {1e3 * whole:>9.1f} ms  head {head / whole:>5.1%}  statistics {said / whole:>5.1%}  "
        f"products alone {alone / whole:>5.1%} of it, {operations / alone / 1e9:,.0f} GFLOP/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), arguments.layers, arguments.width)
        began = time.perf_counter()
        loaded = load_model(folder, arguments.engine, device="cpu", dtype=arguments.dtype, load_format="dummy")
        took = time.perf_counter() - began
    print(in_words(machine()))
    backend, info = loaded.backend, loaded.backend.info
    size = info.parameters * getattr(torch, info.dtype).itemsize
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(
        f"{arguments.engine}, {info.parameters:,} weights in {info.dtype}, {size / 1e6:,.0f} MB; "
        f"loaded in {took:.1f} s, this process grew by {grown / 1e6:,.0f} MB at most"
    )
    print(f"rows of {LENGTH} tokens, {BLOCK} of them candidates; medians of {arguments.rounds} rounds")
    for count in (1, 4, 16):
        if isinstance(backend, TorchBackend):
            print(parts(backend, count, arguments.rounds), flush=True)
            continue
        query = first_step(backend, count)
        times = [timed(lambda query=query: backend.predict(query))() for _ in range(arguments.rounds + 1)][1:]
        print(f"{count:>4} {1e3 * statistics.median(times):>9.1f} ms", flush=True)
    backend.close()


if __name__ == "__main__":
    main()
