"""What a policy gains from each input: one set of runs, one policy fitted to it per choice of inputs, all evaluated.

Run: python -m tests.benchmarks.inputs [--task chain] [--runs 2304] [--steps 300] [--problems 200] [--seed 5]
Only the fit to outcomes, without GRPO after it, at several cuts. Prints a Markdown table: accuracy in % / tokens per
forward for each cut, and the fastest row within a point of `--goal`.
"""

import argparse
import random
import time
from dataclasses import replace

import torch

from policies.evaluation.measure import Trial, evaluate
from policies.evaluation.sampler_spec import SamplerSpec
from policies.model_under_test import ModelUnderTest
from policies.network.config import PolicyConfig
from policies.network.features import Feature, width
from policies.network.observation import Observation
from policies.network.policy_network import LoadedPolicy, UnmaskingPolicy, parameters
from policies.tasks import Task, get_task
from policies.training.actors import Explorer
from policies.training.fit import fit
from policies.training.rollout import rollout
from policies.training.runs import Runs
from samplers.learned.policy import Policy
from samplers.resources import Kind, ResourceTable
from server.commands.options import model_under_test, open_model

ALL: tuple[Feature, ...] = (
    "confidence",
    "doubt",
    "top",
    "top_logs",
    "entropy",
    "margin",
    "neighbours",
    "before",
    "place",
)
TOP = 4
RICH: tuple[Feature, ...] = ("top", "doubt", "top_logs", "entropy", "before", "place")
CUTS = (0.97, 0.99, 0.997)


VARIANTS: dict[str, tuple[tuple[Feature, ...], bool, bool]] = {
    # features, whole region, predicted tokens
    "confidence (the paper's)": (("confidence",), False, False),
    "confidence, doubt": (("confidence", "doubt"), False, False),
    "confidence, doubt, neighbours": (("confidence", "doubt", "neighbours"), False, False),
    "confidence, doubt, margin, entropy": (("confidence", "doubt", "margin", "entropy"), False, False),
    "top 4, doubt, logs, entropy": (("top", "doubt", "top_logs", "entropy"), False, False),
    "these, before, place (the recipe's)": (RICH, False, False),
    "the recipe's, whole region": (RICH, True, False),
    "the recipe's, predicted tokens": (RICH, False, True),
}


def columns(features: tuple[Feature, ...]) -> list[int]:
    """Where these features are among ALL."""
    first, found = 0, {}
    for name in ALL:
        found[name] = range(first, first + width(name, TOP))
        first += width(name, TOP)
    return [column for name in features for column in found[name]]


def cut_down(runs: Runs, features: tuple[Feature, ...], region: bool, tokens: bool) -> Runs:
    """The same runs as a policy with fewer inputs sees them."""
    records, seen = runs.records, runs.records.seen
    numbers = seen.features[..., columns(features)]
    known = torch.ones_like(records.candidates) if region else records.candidates
    given = None
    if tokens:
        assert seen.tokens is not None
        given = seen.tokens.masked_fill(~known, -1)
    cut = Observation(numbers * known[..., None], seen.masked, seen.valid, seen.time, given)
    return Runs(replace(records, seen=cut), runs.good, runs.ends)


def collect(subject: ModelUnderTest, task: Task, vocabulary: int, count: int, seed: int) -> Runs:
    config = PolicyConfig(features=ALL, top=TOP, tokens=vocabulary, region=True)
    rng = random.Random(f"inputs/{seed}")
    parts = []
    for first in range(0, count, 256):
        size = min(256, count - first)
        parts.append(
            rollout(
                subject,
                task,
                [task.draw(rng, "train") for _ in range(size)],
                Explorer(size, rng.getrandbits(31), 0.15),
                gen_length=task.gen_length,
                block_length=None,
                seeds=[rng.getrandbits(31) for _ in range(size)],
                record=config,
            )
        )
    return Runs.of(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="chain")
    parser.add_argument("--runs", type=int, default=2304)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--goal", type=float, default=98.0, help="accuracy in percent")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = open_model(None, "cpu", "float32")
    subject, vocabulary = model_under_test(loaded, False), loaded.backend.info.vocab_size
    task = get_task(arguments.task)
    began = time.perf_counter()
    runs = collect(subject, task, vocabulary, arguments.runs, arguments.seed)
    print(
        f"{arguments.runs} runs in {time.perf_counter() - began:.0f} s, {100 * runs.good.float().mean():.0f} % right\n"
    )
    print(f"| inputs | parameters | {' | '.join(f'cut {cut}' for cut in CUTS)} | fastest at {arguments.goal:g} % |")
    print("|" + "---|" * (3 + len(CUTS)))
    for name, (features, region, tokens) in VARIANTS.items():
        config = PolicyConfig(
            features=features,
            top=TOP,
            tokens=vocabulary if tokens else 0,
            region=region,
            hidden=32,
            feedforward=128,
            output_bias=4.0,
        )
        torch.manual_seed(arguments.seed)
        network = UnmaskingPolicy(config)
        seen = cut_down(runs, features, region, tokens)
        steps = fit(
            network,
            seen,
            label="outcome",
            steps=arguments.steps,
            batch=42,
            learning_rate=3e-3,
            seed=arguments.seed,
        )
        for _ in steps:
            pass
        resources = ResourceTable()
        resources.add("policy", Kind({None: Policy(LoadedPolicy(network))}.__getitem__))
        cells, fastest = [], 0.0
        for cut in CUTS:
            spec = SamplerSpec.create("policy", {"cut": cut})
            trial = Trial(task, spec, None, task.gen_length, arguments.problems, arguments.seed)
            row = evaluate(subject, trial, 48, resources=resources)
            cells.append(f"{100 * row.accuracy:.1f} / {row.tpf:.2f}")
            if 100 * row.accuracy >= arguments.goal:
                fastest = max(fastest, row.tpf)
        best = f"{fastest:.2f}" if fastest else "none"
        print(f"| {name} | {parameters(network):,} | {' | '.join(cells)} | {best} |", flush=True)


if __name__ == "__main__":
    main()
