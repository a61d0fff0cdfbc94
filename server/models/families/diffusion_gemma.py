"""DiffusionGemma (transformers' `diffusion_gemma`), text only.

The same weights read in two ways. Settled tokens are encoded causally, one by one. The block being drafted sees all
of them and all of itself, and receives the previous prediction of the draft as self-conditioning. The two ways differ
only in one factor per layer and in that signal, so that both go through the layers together: the keys and values of a
finished block are written by the next block's first forward pass, which saves one forward pass a block and is exact.

This is our own implementation, which packs rows of any length and age into one forward pass. The checkpoints' vision
tower is not loaded. There is no mask token.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samplers import AttentionPattern
from samplers.forward.statistics import StatisticsRequest
from server.models.decoder import Attend, GatedMLP
from server.models.experts import highest, mix
from server.models.families.diffusion_gemma_config import DiffusionGemmaConfig, Kind, TextConfig
from server.models.layers import rotate, split_heads
from server.models.network import Network
from server.models.ragged_batch import RaggedBatch

DECODER, ENCODER, FACTOR = "model.decoder.", "model.encoder.language_model.", ".layer_scalar"
"""Parts of tensor names: prefixes of the decoder and of the encoder, and the suffix of tensors they do not share."""


class Norm(nn.Module):
    """Root-mean-square norm in float32 up to and including the weight.

    Args:
        weighted: multiply by a weight.
    """

    def __init__(self, width: int, eps: float, weighted: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if weighted else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + self.eps).pow(-0.5)
        return (wide if self.weight is None else wide * self.weight.float()).to(x.dtype)


def gelu_gated(gate: Tensor, up: Tensor) -> Tensor:
    """`gelu(gate) * up`."""
    return F.gelu(gate, approximate="tanh") * up


class GeluMLP(GatedMLP):
    """`down(gelu(gate(x)) * up(x))`."""

    combine = staticmethod(gelu_gated)


class SelfConditioning(GeluMLP):
    """Adds the previous prediction of the draft to the embeddings of the draft."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config.hidden_size, config.intermediate_size)
        self.pre_norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.post_norm = Norm(config.hidden_size, config.rms_norm_eps, weighted=False)

    def forward(self, x: Tensor, signal: Tensor | None = None) -> Tensor:
        """Conditioned embeddings [tokens, width]; the signal has the same shape, and None counts as 0."""
        out: Tensor = self.post_norm(x if signal is None else x + super().forward(self.pre_norm(signal)))
        return out


class Router(nn.Module):
    """Chooses the experts of each token and their weights."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, weighted=False)
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.ones(config.num_experts))
        self.chosen = config.top_k_experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, float32, and expert indices, both [tokens, chosen], for states [tokens, width]."""
        scores = self.proj(self.norm(x) * self.scale * x.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32)
        experts = highest(scores, self.chosen)
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.per_expert_scale[experts], experts


class Experts(nn.Module):
    """Gated MLPs with stacked weights; each processes the tokens routed to it."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        count, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Weighted sums of expert outputs [tokens, width]; arguments as returned by `Router`."""
        each = [partial(self._one, index) for index in range(len(self.gate_up_proj))]
        return mix(each, x, experts, weights).to(x.dtype)

    def _one(self, index: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(gelu_gated(gate, up), self.down_proj[index])


class Attention(nn.Module):
    """Attention of one kind. In full attention, values are the keys before scaling and rotation."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()
        width, (heads, size) = config.hidden_size, config.cache_shape(index)
        self.head_dim = size
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, heads * size, bias=False)
        self.v_proj = nn.Linear(width, heads * size, bias=False) if config.kind(index) is Kind.SLIDING else None
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.q_norm = Norm(size, config.rms_norm_eps)
        self.k_norm = Norm(size, config.rms_norm_eps)
        self.v_norm = Norm(size, config.rms_norm_eps, weighted=False)

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (of the wanted tokens), keys and values, all [tokens, heads, head_dim]."""
        k = self._heads(self.k_proj(h))
        v = k if self.v_proj is None else self._heads(self.v_proj(h))
        k, v = rotate(self.k_norm(k), cos, sin), self.v_norm(v)
        if wanted is not None:
            h, cos, sin = h[wanted], cos[wanted], sin[wanted]
        return rotate(self.q_norm(self._heads(self.q_proj(h))), cos, sin), k, v

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.head_dim)


class Layer(nn.Module):
    """Attention, then an MLP in parallel with experts, each between two norms."""

    def __init__(self, config: TextConfig, index: int) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config.hidden_size, config.rms_norm_eps)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GeluMLP(config.hidden_size, config.intermediate_size)
        self.post_feedforward_layernorm_1 = norm()
        self.router = Router(config)
        self.pre_feedforward_layernorm_2 = norm()
        self.experts = Experts(config)
        self.post_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm = norm()
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """States [tokens, width] of all tokens, or of the `wanted` ones, before the layer's factor."""
        q, k, v = self.project(x, cos, sin, wanted)
        return self.finish(x if wanted is None else x[wanted], attend(q, k, v))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Part before attention: queries (of the wanted tokens), keys and values."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin, wanted)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Part after attention, from states and the attention output [tokens, heads, head_dim]."""
        x = x + self.post_attention_layernorm(self.self_attn.o_proj(mixed.flatten(-2)))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
        out: Tensor = x + self.post_feedforward_layernorm(dense + self.post_feedforward_layernorm_2(sparse))
        return out


class Factor(nn.Module):
    """Factor of a layer's states while it encodes; all else is shared with the decoder's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("layer_scalar", torch.ones(1))


class Decoder(nn.Module):
    """Embedding, layers, final norm and self-conditioning."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class Model(nn.Module):
    """The decoder, and the encoder's own factors."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        factors = nn.ModuleList(Factor() for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"language_model": nn.ModuleDict({"layers": factors})})

    @property
    def factors(self) -> nn.ModuleList:
        language = self.encoder["language_model"]
        assert isinstance(language, nn.ModuleDict)
        factors = language["layers"]
        assert isinstance(factors, nn.ModuleList)
        return factors


class DiffusionGemma(Network):
    """DiffusionGemma with a language model head."""

    Config = DiffusionGemmaConfig
    config: DiffusionGemmaConfig
    ignored = (*Network.ignored, "*.embed_scale", "model.encoder.vision_tower.*", "model.encoder.embed_vision.*")

    def __init__(self, config: DiffusionGemmaConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text_config
        self.pattern = AttentionPattern(noise=text.vocab_size, drafted=config.canvas_length)
        self.block_length = config.canvas_length
        self.model = Model(text)
        self._tables: dict[Kind, tuple[Tensor, Tensor]] = {}

    @classmethod
    def own_name(cls, config: DiffusionGemmaConfig, name: str) -> str:
        """Map the tied head to the embedding, and the encoder's text model, except its factors, to the decoder."""
        if name == "lm_head.weight":
            return "model.decoder.embed_tokens.weight"
        if name.startswith(ENCODER) and not name.endswith(FACTOR):
            return DECODER + name.removeprefix(ENCODER)
        return name

    @classmethod
    def stand_in(cls, name: str) -> str | None:
        """Exports that store the encoder as a copy omit its factors too; the decoder's factors are then used."""
        return DECODER + name.removeprefix(ENCODER) if name.startswith(ENCODER) else None

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    @property
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        return [self.config.text_config.cache_shape(i) for i in range(self.config.text_config.num_hidden_layers)]

    @property
    def _factor(self) -> Tensor:
        """Scale of embeddings, rounded to their dtype."""
        weight = self.decoder.embed_tokens.weight
        return torch.tensor(self.config.text_config.hidden_size**0.5, dtype=weight.dtype, device=weight.device)

    def _rotation(self, kind: Kind, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of at least this length, [length, 1, head_dim]."""
        device = self.decoder.embed_tokens.weight.device
        known = self._tables.get(kind)
        if known is None or known[0].shape[0] < length or known[0].device != device:
            places = torch.arange(max(length, min(self.config.max_length, 4096)), dtype=torch.float32, device=device)
            angle = torch.outer(places, self.config.text_config.frequencies(kind).to(device))
            angle = torch.cat([angle, angle], dim=-1)[:, None]
            known = self._tables[kind] = angle.cos(), angle.sin()
        return known[0].to(dtype), known[1].to(dtype)

    def packed(self, batch: RaggedBatch) -> Tensor:
        text = self.config.text_config
        drafted = torch.cat([torch.arange(row.start, row.stop) >= row.draft for row in batch.rows])
        drafted = F.pad(drafted, (0, len(batch.tokens) - len(drafted)))
        drafted = drafted.to(batch.tokens.device, non_blocking=True)[:, None]
        x = self._embedded(batch, drafted)
        longest = max(row.visible for row in batch.rows)
        kinds = {kind: self._rotation(kind, longest, x.dtype) for kind in set(text.layer_types)}
        tables = {kind: (cos[batch.position], sin[batch.position]) for kind, (cos, sin) in kinds.items()}
        last = len(self.decoder.layers) - 1
        for index, (layer, encoding) in enumerate(zip(self.decoder.layers, self.model.factors, strict=True)):
            kind = text.kind(index)
            window = text.sliding_window if kind is Kind.SLIDING else None
            attend = partial(batch.attend, index, index == last, scale=1.0, window=window)
            wanted = batch.wanted if index == last else None
            x = layer(x, *tables[kind], attend, wanted)
            where = drafted if wanted is None else drafted[wanted]
            x = x * torch.where(where, layer.get_buffer("layer_scalar"), encoding.get_buffer("layer_scalar"))
        out: Tensor = self.decoder.norm(x)
        return out

    def _embedded(self, batch: RaggedBatch, drafted: Tensor) -> Tensor:
        """Input of the first layer: embeddings, those of a draft with self-conditioning."""
        x: Tensor = self.decoder.embed_tokens(batch.tokens) * self._factor
        enter = self.decoder.self_conditioning
        out = x.where(~drafted, enter(x))
        first = 0
        for row in batch.rows:
            said = row.memory and row.memory.self_conditioning
            if said and said[0] == row.draft and row.draft < row.stop:
                at = slice(first + row.draft - row.start, first + row.fed)
                out[at] = enter(x[at], said[1])
            first += row.fed
        return out

    def head(self, hidden: Tensor) -> Tensor:
        cap = self.config.text_config.final_logit_softcapping
        logits: Tensor = F.linear(hidden, self.decoder.embed_tokens.weight).float()
        capped: Tensor = (logits / cap).tanh() * cap
        return capped

    def self_conditioning(self, logits: Tensor, wanted: StatisticsRequest) -> Tensor:
        """Mean embedding under the distribution that tokens are drawn from: all that the next forward pass needs.

        Far smaller than the logits. Top-k and top-p filters are ignored.
        """
        weight = self.decoder.embed_tokens.weight
        scaled = logits
        if wanted.choices is not None:
            heat = wanted.choices.temperature.to(logits.device, logits.dtype)
            scaled = logits / torch.where(heat > 0, heat, 1.0)[:, None]
        scaled = scaled.to(weight.dtype)
        mixed: Tensor = scaled.softmax(dim=-1, dtype=torch.float32).to(weight.dtype) @ weight
        return mixed * self._factor
