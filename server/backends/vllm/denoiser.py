"""Masked diffusion model for vLLM: a pooling model whose forward already returns the statistics that samplers request.

Statistics are computed in `forward`, next to the logits, instead of the pooler: with tensor parallelism, every rank
runs the forward, whose head is split over them, but only the first runs the pooler.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from samplers.forward.prediction import Prediction
from samplers.forward.statistics import StatisticsRequest
from samplers.forward.summary import summarise
from server.backends.torch.backend import LOGIT_ELEMENTS
from server.backends.vllm.config import parse
from server.backends.vllm.instructions import INSTRUCTION, TASK, Instruction, answers, together
from server.models.network import matches

Scheduled = tuple[int, dict[str, Any]]
"""One request of a batch: its number of tokens and its pooling request's keyword arguments."""


class Answers(Pooler):
    """Extracts each request's answer from the output of the forward.

    Attributes:
        logits: full logits of the last forward's requests that need them, by request index: float32 [positions,
            vocabulary]. Kept outside the forward's output, which would otherwise be as wide as the vocabulary for all
            tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, Tensor] = {}

    def get_supported_tasks(self) -> set[str]:
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        lengths = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist()
        parts = torch.split(hidden_states, lengths)
        found = []
        for i, (part, params) in enumerate(zip(parts, pooling_metadata.pooling_params, strict=True)):
            found.append(self.logits[i] if i in self.logits else self._answer(part, params))
        return found

    def _answer(self, part: Tensor, params: Any) -> Tensor:
        if not params.extra_kwargs:
            return part  # a warm-up without requests
        instruction = Instruction.unpack(params.extra_kwargs[INSTRUCTION])
        return part[: len(instruction.position), : instruction.columns].contiguous()


class Denoiser(nn.Module):
    """A masked diffusion model made of vLLM's layers. Subclasses define the layers of a family.

    Attributes:
        own: our own network of the same architecture, which maps the names in checkpoints.
        shifted: True if a position is decided by the output of the previous one.
        packed_modules_mapping: vLLM's fused layers and the checkpoint tensors that they consist of.
        scheduled: returns the requests of the current batch, in order; empty in a warm-up.
    """

    is_pooling_model: ClassVar[bool] = True
    attn_type: ClassVar[str] = "encoder_only"
    default_seq_pooling_type: ClassVar[str] = "LAST"
    default_tok_pooling_type: ClassVar[str] = "ALL"
    score_type: ClassVar[str] = "bi-encoder"
    shifted: ClassVar[bool] = False
    packed_modules_mapping: ClassVar[Mapping[str, list[str]]] = {}

    scheduled: Callable[[], list[Scheduled]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: Any
        _, self.own, self.config = parse(vllm_config.model_config.hf_config.source)
        self.mask_id: int = vllm_config.model_config.hf_config.mask_id
        self.pooler = Answers()
        self.logits_processor = LogitsProcessor(vllm_config.model_config.get_vocab_size())
        self.scheduled = list

    @abstractmethod
    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [tokens, width]."""

    @abstractmethod
    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Normed last hidden states [tokens, width] of several canvases, concatenated."""

    @property
    @abstractmethod
    def head_layer(self) -> nn.Module:
        """The head as a layer of vLLM."""

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocabulary] of hidden states."""
        logits: Tensor = self.logits_processor(self.head_layer, hidden)
        return logits

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: object = None,
    ) -> Tensor:
        """Answers, float32 [tokens, columns]: the answer for a canvas fills its first rows.

        A warm-up has no requests: it returns NaN, and computes as many positions as there are tokens, so that the cost
        is real.
        """
        hidden = self.hidden(input_ids, positions)
        self.pooler.logits = {}
        asked, starts = [], []
        first = 0
        for length, params in self.scheduled():
            asked.append(Instruction.unpack(params[INSTRUCTION]))
            starts.append(first)
            first += length
        if not asked:
            self.answer(hidden, StatisticsRequest())
            return hidden.new_full((len(hidden), 2), torch.nan, dtype=torch.float32)
        if first > len(hidden):
            raise RuntimeError(f"a batch of {first} tokens came in parts: {len(hidden)} in one forward")
        rows = [self.source(each.position) + start for each, start in zip(asked, starts, strict=True)]
        self.pooler.logits = {
            i: self.head(hidden[rows[i].to(hidden.device, non_blocking=True)]).float()
            for i, each in enumerate(asked)
            if each.logits
        }
        plain = [i for i, each in enumerate(asked) if not each.logits]
        out = hidden.new_zeros(len(hidden), max((asked[i].columns for i in plain), default=2), dtype=torch.float32)
        if plain:
            told = [asked[i] for i in plain]
            places = torch.cat([rows[i] for i in plain]).to(hidden.device, non_blocking=True)
            prediction = self.answer(hidden[places], together(told))
            for i, answer in zip(plain, answers(told, prediction), strict=True):
                out[starts[i] : starts[i] + len(answer), : answer.shape[1]] = answer
        return out

    def source(self, position: Tensor) -> Tensor:
        """Positions whose output decides these positions of a canvas."""
        return (position - 1).clamp(min=0) if self.shifted else position

    def answer(self, hidden: Tensor, wanted: StatisticsRequest) -> Prediction:
        """Requested statistics of these rows of hidden states."""
        wanted = wanted.to(hidden.device)
        size = max(1, LOGIT_ELEMENTS // self.config.rows)
        return Prediction.join(
            [
                summarise(self.head(hidden[start : start + size]), self.mask_id, wanted.part(start, start + size))
                for start in range(0, len(hidden), size)
            ]
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors. Returns the names of the parameters that were set."""
        parameters: dict[str, Any] = dict(self.named_parameters())
        fused = {
            part: (whole, shard)
            for whole, parts in self.packed_modules_mapping.items()
            for part, shard in zip(parts, ("q", "k", "v") if len(parts) == 3 else (0, 1), strict=True)
        }
        done = set()
        for name, tensor in weights:
            if matches(name, self.own.ignored):
                continue
            name = self.own.own_name(self.config, name)  # copies were checked to be equal
            place, _, leaf = name.rpartition(".")
            place, _, part = place.rpartition(".")
            if part in fused:
                whole, shard = fused[part]
                name = f"{place}.{whole}.{leaf}"
                parameter = parameters[name]
                parameter.weight_loader(parameter, tensor, shard)
            else:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            done.add(name)
        return done
