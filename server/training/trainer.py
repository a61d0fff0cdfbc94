"""Training of a small masked diffusion model from a recipe. A resumed run sees the same rows."""

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from tokenizers import Tokenizer
from torch import Tensor

from policies.files.atomic import write_file
from policies.files.regular import check_safetensors
from policies.tasks import embedded_tasks
from server.models.checkpoint.weights import SkipInit
from server.models.families.llada import LLaDA, LLaDAConfig
from server.runtime.allocator import available_memory
from server.training.canvases import CanvasMaker, Rows
from server.training.muon import Muon
from server.training.recipe import Recipe
from server.training.tokenizer import END, MASK, build_tokenizer, number_ids, special_id

NUMBER_PERIODS = (400.0, 200.0, 100.0, 50.0, 25.0, 20.0, 10.0, 5.0, 4.0, 2.5, 2.0)


def task_tokenizer() -> Tokenizer:
    """Tokenizer of the embedded tasks."""
    problems = [problem for task in embedded_tasks() for problem in task.problems(500, 0, "train")]
    return build_tokenizer([text for problem in problems for text in (problem.prompt, problem.reference)])


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> LLaDAConfig:
    end = special_id(tokenizer, END)
    return LLaDAConfig(
        **recipe.model.model_dump(),
        n_kv_heads=recipe.model.n_heads,
        vocab_size=tokenizer.get_vocab_size(),
        embedding_size=tokenizer.get_vocab_size(),
        mask_token_id=special_id(tokenizer, MASK),
        eos_token_id=end,
        pad_token_id=end,
    )


def _check_memory(config: LLaDAConfig) -> None:
    """Raise ValueError if a model, its gradients and the optimizer's moments cannot fit into memory."""
    with torch.device("meta"), SkipInit():
        need = 4 * sum(p.numel() * p.itemsize for p in LLaDA(config).parameters())
    with suppress(OSError):  # systems that do not report it
        if need > (there := available_memory(torch.device("cpu"))):
            raise ValueError(f"training this model takes {need / 1e9:.1f} GB of memory, and {there / 1e9:.1f} are left")


@torch.no_grad()
def initialise(model: LLaDA, numbers: list[list[int]]) -> None:
    """Draw scaled normal weights. The tokens of 0 ... 99 start as waves of several periods, the head as the embedding.

    With random number embeddings the model would memorise every sum separately. All weights train as usual.
    """
    net = model.transformer
    for name, p in net.blocks.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("attn_out.weight", "ff_out.weight"))
            torch.nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.3 if residual else 0.6))
    torch.nn.init.normal_(net.wte.weight, std=0.5)
    angle = 2 * math.pi * torch.arange(100)[:, None] / torch.tensor(NUMBER_PERIODS)
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    mix = torch.linalg.qr(torch.randn(model.config.d_model, waves.shape[1]))[0].T
    start = waves @ mix
    for ids in numbers:
        net.wte.weight[ids] = 0.5 * start / start.pow(2).mean().sqrt()
    net.ff_out.weight.copy_(net.wte.weight * 0.08)


def make_optimizers(model: LLaDA, recipe: Recipe) -> list[torch.optim.Optimizer]:
    settings = recipe.optimizer
    matrices = [p for p in model.transformer.blocks.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.98), "weight_decay": 0.0}
    if settings.name == "muon":
        muon = Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        return [muon, torch.optim.AdamW(others, **adam)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others},
    ]
    return [torch.optim.AdamW(groups, **adam)]


@dataclass
class Trainer:
    """One run. `seconds` counts training time over all sessions, so that a resumed run keeps its schedule.

    Set `stopping` to end `run` after the current step. The constructor raises ValueError if the recipe's tasks cannot
    provide what it asks for.
    """

    recipe: Recipe
    out: Path
    step: int = 0
    seconds: float = 0.0
    stopping: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.tokenizer = task_tokenizer()
        config = model_config(self.recipe, self.tokenizer)
        _check_memory(config)
        self.model = LLaDA(config)
        initialise(self.model, number_ids(self.tokenizer))
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.canvases = CanvasMaker(self.recipe, self.tokenizer)
        self.canvases.check()
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.safetensors"

    @property
    def progress(self) -> float:
        """Fraction of the run that is done, by steps or by minutes, whichever is further."""
        limit = self.recipe.max_minutes
        timed = self.seconds / 60 / limit if limit else 0.0
        return min(1.0, max(self.step / self.recipe.steps, timed))

    def rate(self) -> float:
        settings = self.recipe.optimizer
        warm = (self.step + 1) / settings.warmup_steps
        return settings.learning_rate * min(1.0, warm, (1 - self.progress) / settings.decay_share)

    def loss(self, rows: Rows) -> Tensor:
        """Weighted cross-entropy of the masked tokens, [rows]."""
        hidden = self.model.hidden(rows.tokens.masked_fill(rows.masked, self.canvases.mask_id))
        at = rows.weight > 0
        losses = F.cross_entropy(self.model.head(hidden[at]), rows.tokens[at], reduction="none")
        return (losses * rows.weight[at]).sum() / len(rows.tokens)

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step over the micro-batches that take part. Returns the loss of each, by name."""
        losses: dict[str, float] = {}
        rate, progress = self.rate(), self.progress
        for offset, batch in enumerate(self.recipe.micro_batch):
            if not batch.takes_part(self.step + offset, progress):
                continue
            loss = self.loss(self.canvases.draw(batch, self.step))
            loss.backward()  # type: ignore[no-untyped-call]
            losses[batch.name] = loss.item()
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"the loss is not finite at step {self.step}: {losses}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    def save(self) -> None:
        """Write the run's state. A kill at any point leaves the old file or the new one."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{index}.{key}": value for key, value in state.items()}
        metadata = {"step": str(self.step), "seconds": str(self.seconds), "recipe": self.recipe.model_dump_json()}
        content = save_tensors({name: value.contiguous() for name, value in tensors.items()}, metadata)
        write_file(self.checkpoint, content)

    def resume(self) -> bool:
        """Continue from the checkpoint in `out`, if there is one. Raises ValueError if another recipe wrote it."""
        if not self.checkpoint.exists():
            return False
        check_safetensors(self.checkpoint)
        with safe_open(self.checkpoint, "pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["recipe"]) != json.loads(self.recipe.model_dump_json()):
            raise ValueError(f"{self.checkpoint} belongs to another recipe; choose another --out or delete it")
        tensors = load_file(self.checkpoint)
        self.model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        for i, optimizer in enumerate(self.optimizers):
            saved = optimizer.state_dict()
            states: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, index, key = name.split(".")
                    states.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        return True

    def run(self, console: Console) -> None:
        """Train to the end. Shows a progress bar on `console` and logs each step to `log.jsonl`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar, (self.out / "log.jsonl").open("a", buffering=1) as log:
            task = bar.add_task("training", total=self.recipe.steps, completed=self.step)
            while self.progress < 1 and not self.stopping:
                began = time.monotonic()
                rate = self.rate()
                losses = self.train_step()
                self.seconds += time.monotonic() - began
                line = {"step": self.step, "seconds": round(self.seconds, 1), "rate": rate, **losses}
                log.write(json.dumps(line) + "\n")
                shown = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
                bar.update(task, completed=self.step, description=shown)
                if self.step % self.recipe.save_every == 0:
                    self.save()
        self.save()
