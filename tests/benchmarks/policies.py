"""What policies cost a step: one, four different ones, and a threshold, over the same batch of the embedded model.

Run: python -m tests.benchmarks.policies [--rows 16] [--rounds 30]
Alternates the three in one run and prints the median step of each, and medians of ratios.
"""

import argparse
import statistics
import time

import torch

from policies.network.config import PolicyConfig
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy
from policies.tasks import get_task
from samplers import Canvas, Sampler, get_sampler
from samplers.learned.policy import Policy
from samplers.loop.row import Row
from samplers.loop.run import run
from server.backends.loading import load_model

CONFIG = PolicyConfig(features=("top", "doubt", "top_logs", "entropy"), top=4, region=False, hidden=64, feedforward=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    loaded = load_model(None, device="cpu", dtype="float32")
    info, backend = loaded.backend.info, loaded.backend
    problems = get_task("chain").problems(arguments.rows, 0, "heldout")
    torch.manual_seed(0)
    policies = [Policy(LoadedPolicy(UnmaskingPolicy(CONFIG))) for _ in range(4)]
    kinds: dict[str, list[Sampler]] = {
        "threshold": [get_sampler("threshold")],
        "one policy": policies[:1],
        "four policies": policies,
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.rounds):
        for name, samplers in kinds.items():
            rows = []
            for i, problem in enumerate(problems):
                canvas = Canvas.blank(loaded.text.encode(problem.prompt), 64, info.mask_id)
                sampler = samplers[i % len(samplers)]
                rows.append(Row(canvas, sampler, sampler.Params(), seed=i, end_ids=info.end_ids))
            began = time.perf_counter()
            next(run(rows, backend.predict))
            seconds[name].append(time.perf_counter() - began)
    base = seconds["threshold"]
    for name, found in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"{name}: {1000 * statistics.median(found):.1f} ms a step, {ratio:.3f} of threshold")


if __name__ == "__main__":
    main()
