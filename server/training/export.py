"""From a finished run to a Hugging Face folder with LLaDA's own names, and its model card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from policies.tasks import embedded_tasks
from server.evaluation.card import place
from server.models.llada import LLaDAConfig
from server.training.tokenizer import END, MASK
from server.training.trainer import Trainer

# The model was trained on single problems with nothing around them, so an earlier message would only confuse it.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- if not asked -%}{{ raise_exception('there is no user message') }}{%- endif -%}"
    "{{ (asked | last).content | trim }}"
)


def export(trainer: Trainer, recipe_text: str, threads: int, folder: Path, note: str = "") -> None:
    """Write config, weights in bfloat16, tokenizer and card of a run into `folder`; each file whole or not at all.

    `note` goes into the card: what the recipe does not tell, such as a change in the middle of the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
    _write(folder / "config.json", lambda path: _write_json(path, model_json(config)))
    _write(folder / "generation_config.json", lambda path: _write_json(path, ends))
    _write(folder / "tokenizer_config.json", lambda path: _write_json(path, settings))
    _write(folder / "tokenizer.json", lambda path: trainer.tokenizer.save(str(path)))
    _write(folder / "model.safetensors", lambda path: save_file(tensors, path, {"format": "pt"}))
    card = model_card(trainer, recipe_text, threads, note, (folder / "model.safetensors").stat().st_size)
    _write(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))


def model_json(config: LLaDAConfig) -> dict[str, Any]:
    """The `config.json` of a LLaDA checkpoint."""
    named = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "torch_dtype": "bfloat16"}
    return named | config.model_dump(mode="json")


def model_card(trainer: Trainer, recipe_text: str, threads: int, note: str, size: int) -> str:
    """What the model is, how it was trained and how to measure it; `size` is of its weights in bytes."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    taught = {name for batch in trainer.recipe.micro_batch for name in batch.rows}
    known = [task for task in embedded_tasks() if task.name in taught] or embedded_tasks()
    tasks = "\n".join(f"- `{task.name}`: {task.description}" for task in known)
    example = known[0].problems(1, 0, "heldout")[0]
    remark = f"\n{note.strip()}\n" if note else ""
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [diffusion-language-model, llada]
---

# A small masked-diffusion language model

It solves problems of these kinds, and nothing else:

{tasks}

A problem goes to the model as it stands, for example:

> {example.prompt}

and the answer ends with the result: `{example.reference}`

## What it is

LLaDA's architecture (bidirectional Llama blocks; https://arxiv.org/abs/2502.09992) with {parameters:,} parameters
({size:,} bytes in bfloat16) and a vocabulary of {trainer.model.config.rows} tokens: words and numbers of the tasks, and
bytes for everything else. It was trained from nothing on generated problems; problems whose
key has a CRC-32 divisible by 16 are held out.

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

To measure it again, `MODEL` being this folder:

```
unmask evaluate --model MODEL --block-length full --block-length 8 --block-length 16 --count 500 --json rows.json \\
  --card MODEL
```
"""


def curve(log: Path, last: int, points: int = 6) -> str:
    """Rate and losses, means over equal shares of the logged steps up to `last`, as a Markdown table."""
    # A run that was killed repeats the steps after its last checkpoint; what came last counts.
    lines = {line["step"]: line for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())}
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
    """Mean over the lines that have the number; nothing if none has."""
    found = [line[name] for line in lines if name in line]
    return format(sum(found) / len(found), form) if found else ""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, readable by everyone, so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.chmod(0o644)
    partial.replace(path)
