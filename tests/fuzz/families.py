"""The tiny models that are asked, and what anybody can know of them from their files and papers."""

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

import policies
from server.training.tokenizer import END
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.tiny import write_tiny_model
from tests.tiny_dream import ADDED, write_tiny_dream
from tests.tiny_gemma import CANVAS, write_tiny_gemma
from tests.tiny_moe import llada2_config, llada_moe_config, write_model

TOLD = "decoder.self_conditioning.down_proj.weight"
POLICY = Path(policies.__file__).parent / "zoo" / "general"
"""A policy that looks at numbers of a prediction only, so that it can denoise any model with a mask token."""
IM_END, ROLE_END = "<|im_end|>", "<|role_end|>"


def write_calm_gemma(folder: Path) -> None:
    """One that listens to itself as little as a trained model: a random one amplifies the last bits of a number."""
    write_tiny_gemma(folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(TOLD))
    tensors[name] *= 0.05
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        architecture: its name in `config.json`.
        write: makes a tiny checkpoint in a folder.
        ends: names of the tokens that end a text.
        block: the model's own block length; None where it has none and denoises the whole region.
        divides: whether blocks must divide the model's.
        causal: whether no block sees a later one, so that text cannot depend on how much follows.
        drafts: whether it has no mask token, and a sampler of its own only.
        context: the longest canvas.
    """

    architecture: str
    write: Callable[[Path], object]
    ends: tuple[str, ...] = (END,)
    block: int | None = None
    divides: bool = False
    causal: bool = False
    drafts: bool = False
    context: int = 256


FAMILIES: dict[str, Family] = {
    "llada": Family("LLaDAModelLM", write_tiny_model),
    "llada-ending": Family("LLaDAModelLM", partial(write_tiny_model, end_bias=8.0)),
    "llada-moe": Family(
        "LLaDAMoEModelLM", lambda folder: write_model(folder, llada_moe_config()), ends=(END, ROLE_END)
    ),
    "dream": Family("DreamModel", write_tiny_dream, ends=(END, IM_END)),
    "llada2": Family(
        "LLaDA2MoeModelLM",
        lambda folder: write_model(folder, llada2_config()),
        ends=(END, ROLE_END),
        block=32,
        causal=True,
    ),
    "sdar": Family(
        "SDARForCausalLM", partial(write_decoder, architecture=SDAR), ends=(END, IM_END), block=4, causal=True
    ),
    "sdar-moe": Family(
        "SDARMoeForCausalLM", partial(write_decoder, architecture=SDAR_MOE), ends=(END, IM_END), block=4, causal=True
    ),
    "fast-dllm-v2": Family(
        "Fast_dLLM_QwenForCausalLM",
        partial(write_decoder, architecture=FAST_DLLM),
        ends=(END, IM_END),
        block=16,
        divides=True,
        causal=True,
    ),
    "diffusion-gemma": Family(
        "DiffusionGemmaForBlockDiffusion", write_calm_gemma, block=CANVAS, causal=True, drafts=True, context=128
    ),
}


@dataclass(frozen=True)
class Subject:
    """A checkpoint of a family, read with Hugging Face's `tokenizers` and nothing of ours."""

    name: str
    folder: Path
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", FAMILIES[self.name])

    @classmethod
    def make(cls, name: str, folder: Path) -> "Subject":
        FAMILIES[name].write(folder)
        return cls(name, folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if (self.folder / "tokenizer.json").exists():
            return Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        files = (str(self.folder / name) for name in ("vocab.json", "merges.txt"))
        tokenizer = Tokenizer(models.BPE.from_file(*files))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(ADDED)
        return tokenizer

    @cached_property
    def ends(self) -> Set[int]:
        """Tokens that end a text unless `ignore_eos` is set."""
        return {self._id(name) for name in self.family.ends}

    @cached_property
    def plain(self) -> list[int]:
        """Tokens that are not special, in a prompt or as a stop."""
        special = set(self.tokenizer.get_added_tokens_decoder())
        return [i for i in range(self.tokenizer.get_vocab_size()) if i not in special and i not in self.ends]

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _id(self, name: str) -> int:
        found = self.tokenizer.token_to_id(name)
        assert found is not None, f"{self.name} has no token {name}"
        return found
