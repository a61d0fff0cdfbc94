"""Export of a finished run to a Hugging Face folder with LLaDA's tensor names and a model card."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer

from policies.evaluation.card import place
from policies.files.atomic import write_together
from policies.files.regular import read_text
from policies.tasks import Split, Task, embedded_tasks, get_task
from server.models.families.llada import LLaDAConfig
from server.training.tokenizer import END, MASK
from server.training.trainer import Trainer

MAX_LOG_BYTES = 1 << 30

# The model was trained on single problems without any context, so an earlier message would only confuse it.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if not asked -%}{{ raise_exception('there is no user message') }}{%- endif -%}"
    "{{ (asked | last).content | trim }}"
)


def export(trainer: Trainer, recipe_text: str, threads: int, folder: Path, note: str = "") -> None:
    """Write config, bfloat16 weights, tokenizer and model card of a run into `folder`, all of them or none.

    `note` is added to the card: facts the recipe does not record, such as a change in the middle of the run.
    """
    config = trainer.model.config
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "chat_template": CHAT_TEMPLATE,
    }
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in trainer.model.state_dict().items()}
    weights = save_tensors(tensors, {"format": "pt"})
    files = {
        "generation_config.json": _json(ends),
        "tokenizer_config.json": _json(settings),
        "tokenizer.json": trainer.tokenizer.to_str(pretty=True),
        "README.md": model_card(trainer, recipe_text, threads, note, len(weights)),
        "config.json": _json(model_json(config)),
    }
    # Weights come last: they make the folder a model.
    write_together(folder, {"model.safetensors": weights, **{name: text.encode() for name, text in files.items()}})


def model_json(config: LLaDAConfig) -> dict[str, Any]:
    """The `config.json` of a LLaDA checkpoint."""
    named = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "bfloat16"}
    return named | config.model_dump(mode="json")


def model_card(trainer: Trainer, recipe_text: str, threads: int, note: str, size: int) -> str:
    """Model card: the model, its training and how to measure it. `size` is that of the weights, in bytes."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    taught = dict.fromkeys(name for batch in trainer.recipe.micro_batch for name in batch.tasks)
    tasks = {name: get_task(name) for name in taught}
    ours = all(task in embedded_tasks() for task in tasks.values())
    lines = [f"- `{task.name}`: {task.description}" for task in tasks.values()]
    if any(batch.kind == "equations" for batch in trainer.recipe.micro_batch):
        lines.append("- sums with one operation, of which only the result is to be found")
    kinds = "\n".join(lines)
    remark = f"\n{note.strip()}\n" if note else ""
    # We can license generated problems, but not those of other authors, whose language is unknown too.
    licence = "license: apache-2.0\nlanguage: en\n" if ours else ""
    return f"""---
{licence}pipeline_tag: text-generation
tags: [diffusion-language-model, llada]
---

# A small masked-diffusion language model

It was trained on problems of these kinds, and on nothing else:

{kinds}
{_example(list(tasks.values()))}
## What it is

LLaDA's architecture (bidirectional Llama blocks; https://arxiv.org/abs/2502.09992) with {parameters:,} parameters
({size:,} bytes in bfloat16) and a vocabulary of {trainer.model.config.rows} tokens: words and numbers of the tasks
that come with Unmask, and bytes for everything else. It was trained from nothing. {_data(list(tasks.values()))}

## Training

`unmask train-model` with the recipe below: seed {trainer.recipe.seed}, {trainer.step} steps in
{trainer.seconds / 60:.0f} minutes on {threads} processor {"thread" if threads == 1 else "threads"}, in float32.
{remark}
{curve(trainer.out / "log.jsonl", trainer.step)}

```toml
{recipe_text.strip()}
```

## Measured

{place("Not measured yet.")}
{_how_to_measure(tasks, trainer.tokenizer)}"""


def _example(tasks: list[Task]) -> str:
    """One problem, held out where possible, and its answer; empty if the model was trained on no problems."""
    if not tasks:
        return ""
    split: Split = "train" if tasks[0].count("heldout") == 0 else "heldout"
    example = tasks[0].problems(1, 0, split)[0]
    prompt = "\n".join(f"> {line}" for line in example.prompt.splitlines())
    fence = "`" * (1 + max(map(len, re.findall("`+", example.reference)), default=2))
    return f"""
A problem goes to the model as it stands, for example:

{prompt}

A right response to it:

{fence}
{example.reference}
{fence}
"""


def _data(tasks: list[Task]) -> str:
    """Origin of the problems, and which of them are held out."""
    said = []
    if any(task.count("train") is None for task in tasks):
        said.append("Generated problems whose key has a CRC-32 divisible by 16 are held out.")
    for task in tasks:
        if (count := task.count("train")) is not None:
            held_out = task.count("heldout")
            said.append(f"`{task.name}` has {count} problems from files to train on; {held_out} are held out.")
    return "\n".join(said)


def _how_to_measure(tasks: dict[str, Task], tokenizer: Tokenizer) -> str:
    """One evaluation command for all generated tasks, and one for each task from files, which sets its own length."""
    commands = []
    generated = [name for name, task in tasks.items() if task.count("heldout") is None]
    if generated:
        named = "".join(f" --task {shlex.quote(name)}" for name in generated)
        commands.append(f"{named} --block-length full --block-length 8 --block-length 16 --count 500")
    for name, task in tasks.items():
        if count := task.count("heldout"):
            problems = task.problems(count, 0, "heldout")
            length = 1 + max(len(tokenizer.encode(problem.reference).ids) for problem in problems)
            commands.append(f" --task {shlex.quote(name)} --gen-length {length} --count {min(count, 500)}")
    if not commands:
        return "\nThere are no held-out problems to measure it on.\n"
    lines = "\n".join(f"unmask evaluate --model MODEL{each} --json rows.json \\\n  --card MODEL" for each in commands)
    return f"\nTo measure it again, `MODEL` being this folder:\n\n```\n{lines}\n```\n"


def curve(log: Path, last: int, points: int = 6) -> str:
    """Learning rate and losses as a Markdown table: means over equal shares of the logged steps up to `last`."""
    # A killed run repeats the steps after its last checkpoint; the latest line of a step counts.
    lines = {line["step"]: line for line in map(json.loads, read_text(log, MAX_LOG_BYTES).splitlines())}
    steps = sorted(step for step in lines if step <= last)
    if not steps:
        return "Its log holds no steps."
    losses = [name for name in dict.fromkeys(name for step in steps for name in lines[step]) if name not in _NOT_LOSSES]
    rows = [f"| steps | minutes | rate | {' | '.join(losses)} |", "|---" * (len(losses) + 3) + "|"]
    size = -(-len(steps) // points)
    for start in range(0, len(steps), size):
        share = [lines[step] for step in steps[start : start + size]]
        cells = [f"{share[0]['step']}-{share[-1]['step']}", f"{share[-1]['seconds'] / 60:.0f}"]
        cells += [_mean(share, "rate", ".1e"), *(_mean(share, name, ".3f") for name in losses)]
        rows.append(f"| {' | '.join(cells)} |")
    return "Mean learning rate, and mean loss of each micro-batch:\n\n" + "\n".join(rows)


_NOT_LOSSES = frozenset({"step", "seconds", "rate"})


def _mean(lines: list[dict[str, float]], name: str, form: str) -> str:
    """Mean of a number over the lines that have it; empty if none has."""
    found = [line[name] for line in lines if name in line]
    return format(sum(found) / len(found), form) if found else ""


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
