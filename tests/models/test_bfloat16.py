"""Half precision, type by type as the originals have it: what is rounded, and what stays float32.

The references are written from the originals' published formulas, on the tensors of a file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.backends.loading import load_model, load_network
from server.backends.torch.backend import TorchBackend
from server.models.families.llada2 import Router
from server.models.network import Network
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, block_mask, decoder_config, in_transformers, write_decoder
from tests.tiny import tiny_config, tiny_tokenizer, write_tiny_model
from tests.tiny_moe import llada2_config, llada_moe_config, write_model

BF16 = torch.bfloat16
WEIGHTS = "model.safetensors"


def rounded(folder: Path, *kept: str) -> dict[str, Tensor]:
    """A file's tensors in bfloat16, but for those whose names end like this."""
    return {name: t if name.endswith(kept) else t.to(BF16) for name, t in load_file(folder / WEIGHTS).items()}


def norm(x: Tensor, weight: Tensor, eps: float, wide: bool = False) -> Tensor:
    """Statistics in float32; the weight is multiplied there too (`wide`), or after going back."""
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (x32 * weight.to(torch.float32)).to(x.dtype) if wide else weight * x32.to(x.dtype)


def turn(x: Tensor, theta: float, size: int, full: bool = False) -> Tensor:
    """Rotate the first numbers of [heads, length, head_dim], by angles rounded to the states' type or in full."""
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequency)
    angle = torch.cat([angle, angle], dim=-1)
    kind = torch.float32 if full else x.dtype
    cos, sin, part = angle.cos().to(kind), angle.sin().to(kind), x[..., :size].to(kind)
    left, right = part.chunk(2, dim=-1)
    turned = part * cos + torch.cat([-right, left], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), x[..., size:]], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[heads, length, head_dim] each, the last two of fewer heads, to [length, heads * head_dim]."""
    k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
    given = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=given)[0].transpose(0, 1).flatten(1)


def heads(x: Tensor, size: int) -> Tensor:
    """[length, heads * size] to [heads, length, size]."""
    return x.view(len(x), -1, size).transpose(0, 1)


def mlp(t: dict[str, Tensor], place: str, x: Tensor) -> Tensor:
    gate, up, down = (t[f"{place}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def llada2_experts(t: dict[str, Tensor], place: str, x: Tensor, config: dict[str, Any]) -> Tensor:
    """The router computes in float32, on a float32 bias; so is the sum."""
    scores = torch.sigmoid(F.linear(x.to(torch.float32), t[f"{place}.gate.weight"].to(torch.float32)))
    biased = scores + t[f"{place}.gate.expert_bias"]
    groups = biased.view(len(x), config["n_group"], -1)
    best = groups.topk(2, dim=-1)[0].sum(dim=-1).topk(config["topk_group"], dim=-1)[1]
    kept = torch.zeros(groups.shape[:2]).scatter_(1, best, 1).bool()[..., None].expand(groups.shape)
    chosen = groups.masked_fill(~kept, float("-inf")).reshape(len(x), -1).topk(config["num_experts_per_tok"])[1]
    weight = scores.gather(1, chosen)
    weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
    rows = []
    for token, experts, share in zip(x, chosen, weight, strict=True):
        made = torch.stack([mlp(t, f"{place}.experts.{e}", token[None])[0] for e in experts.tolist()])
        rows.append((made.to(torch.float32) * share[:, None]).sum(0).to(x.dtype))
    return torch.stack(rows) + mlp(t, f"{place}.shared_experts", x)


def llada2(t: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    x, size, eps = t["model.word_embeddings.weight"][ids], config["head_dim"], config["rms_norm_eps"]
    count, keys, mask = config["num_attention_heads"], config["num_key_value_heads"], block_mask(len(ids), 32)
    for i in range(config["num_hidden_layers"]):
        at, h = f"model.layers.{i}", norm(x, t[f"model.layers.{i}.input_layernorm.weight"], eps)
        mixed = heads(F.linear(h, t[f"{at}.attention.query_key_value.weight"]), size)
        q, k, v = mixed.split([count, keys, keys])
        q = turn(norm(q, t[f"{at}.attention.query_layernorm.weight"], eps), config["rope_theta"], size // 2)
        k = turn(norm(k, t[f"{at}.attention.key_layernorm.weight"], eps), config["rope_theta"], size // 2)
        x = x + F.linear(attend(q, k, v, mask), t[f"{at}.attention.dense.weight"])
        h = norm(x, t[f"{at}.post_attention_layernorm.weight"], eps)
        dense = i < config["first_k_dense_replace"]
        x = x + (mlp(t, f"{at}.mlp", h) if dense else llada2_experts(t, f"{at}.mlp", h, config))
    return F.linear(norm(x, t["model.norm.weight"], eps), t["lm_head.weight"])


def softmax_experts(
    t: dict[str, Tensor], place: str, x: Tensor, count: int, normalised: bool, bias: Tensor | None
) -> Tensor:
    """Logits in the states' type, softmax and bias in float32, weights and the sum in the states' type again."""
    scores = F.softmax(F.linear(x, t[f"{place}.gate.weight"]), dim=1, dtype=torch.float32)
    if bias is not None:
        scores = scores + bias
    weight, chosen = scores.topk(count, dim=-1)
    if normalised:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    weight, out = weight.to(x.dtype), torch.zeros_like(x)
    for expert in range(scores.shape[1]):
        for token, slot in (chosen == expert).nonzero().tolist():
            made = mlp(t, f"{place}.experts.{expert}", x[token][None])[0]
            out[token] = out[token] + made * weight[token, slot]
    return out


def qwen3_like(
    t: dict[str, Tensor],
    config: dict[str, Any],
    ids: Tensor,
    mask: Tensor | None,
    wide: bool,
    feed_forward: Callable[[str, Tensor], Tensor],
) -> Tensor:
    """SDAR's and LLaDA-MoE's layers: norms over heads, then Qwen's attention."""
    x, theta, eps = t["model.embed_tokens.weight"][ids], config["rope_theta"], config.get("rms_norm_eps", 1e-6)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, t[f"{at}.input_layernorm.weight"], eps, wide)
        q, k, v = (heads(F.linear(h, t[f"{at}.self_attn.{part}_proj.weight"]), size) for part in "qkv")
        q = turn(norm(q, t[f"{at}.self_attn.q_norm.weight"], eps, wide), theta, size)
        k = turn(norm(k, t[f"{at}.self_attn.k_norm.weight"], eps, wide), theta, size)
        x = x + F.linear(attend(q, k, v, mask), t[f"{at}.self_attn.o_proj.weight"])
        x = x + feed_forward(f"{at}.mlp", norm(x, t[f"{at}.post_attention_layernorm.weight"], eps, wide))
    return F.linear(norm(x, t["model.norm.weight"], eps, wide), t["lm_head.weight"])


def llada(t: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """Queries and keys are rotated in float32."""
    at, size, eps = "model.transformer", config["d_model"] // config["n_heads"], 1e-5
    x = t[f"{at}.wte.weight"][ids]
    for i in range(config["n_layers"]):
        block = f"{at}.blocks.{i}"
        h = norm(x, t[f"{block}.attn_norm.weight"], eps)
        q, k, v = (heads(F.linear(h, t[f"{block}.{part}_proj.weight"]), size) for part in "qkv")
        q, k = (turn(each, config["rope_theta"], size, full=True) for each in (q, k))
        x = x + F.linear(attend(q, k, v, None), t[f"{block}.attn_out.weight"])
        h = norm(x, t[f"{block}.ff_norm.weight"], eps)
        gate, up = (F.linear(h, t[f"{block}.{part}_proj.weight"]) for part in ("ff", "up"))
        x = x + F.linear(F.silu(gate) * up, t[f"{block}.ff_out.weight"])
    return F.linear(norm(x, t[f"{at}.ln_f.weight"], eps), t[f"{at}.ff_out.weight"])


def served(folder: Path) -> Network:
    """The network as the server loads it."""
    backend = load_model(str(folder), device="cpu", dtype="bfloat16").backend
    assert isinstance(backend, TorchBackend)
    return backend.network


IDS = torch.randint(2, 80, (70,), generator=torch.Generator().manual_seed(5))


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Equal but for a product's last bit here and there, which no choice of a token notices."""
    assert found.dtype == expected.dtype == BF16 and expected.float().std() > 0.5
    assert (found == expected).float().mean() > 0.97
    assert found.argmax(-1).equal(expected.argmax(-1))


def with_bias(folder: Path, name: str, scale: float) -> Path:
    """Give the routers' biases values that bfloat16 rounds: nearly alike, far from 0."""
    tensors = load_file(folder / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for key, tensor in tensors.items():
        if key.endswith(name):
            tensors[key] = 3.0 + scale * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def test_llada2(tmp_path: Path) -> None:
    config = llada2_config()
    folder = with_bias(write_model(tmp_path / "m", config), "expert_bias", 0.005)
    expected = llada2(rounded(folder, "expert_bias"), config, IDS)
    assert_alike(served(folder)(IDS[None])[0], expected)
    wrong = llada2(rounded(folder), config, IDS)
    assert not wrong.argmax(-1).equal(expected.argmax(-1)), "the bias's last bits count"


def test_llada2_chooses_the_same_experts(tmp_path: Path) -> None:
    """Each router alone, on many states: of a mistake in one of them not all tokens would tell."""
    config = llada2_config(num_experts=32, n_group=4, topk_group=2, num_experts_per_tok=4)
    folder = with_bias(write_model(tmp_path / "m", config), "expert_bias", 0.005)
    network, tensors = served(folder), load_file(folder / WEIGHTS)
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)).to(BF16)
    for i in (1, 2):
        router = network.get_submodule(f"model.layers.{i}.mlp.gate")
        assert isinstance(router, Router)
        scores = torch.sigmoid(x.float() @ tensors[f"model.layers.{i}.mlp.gate.weight"].to(BF16).float().T)
        groups = (scores + tensors[f"model.layers.{i}.mlp.gate.expert_bias"]).view(500, 4, 8)
        best = groups.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
        out = torch.ones(500, 4, dtype=torch.bool).scatter_(1, best, False)
        chosen = groups.masked_fill(out[..., None], -torch.inf).flatten(1).topk(4)[1]
        assert router(x)[0].sort(dim=1)[0].equal(chosen.sort(dim=1)[0])


@pytest.mark.parametrize("biased", [False, True])
def test_llada_moe(tmp_path: Path, biased: bool) -> None:
    config = llada_moe_config(moe_router_enable_expert_bias=biased, rms_norm_eps=1e-5)
    folder = with_bias(write_model(tmp_path / "m", config), "expert_bias", 0.005)

    def forward(tensors: dict[str, Tensor]) -> Tensor:
        def experts(at: str, x: Tensor) -> Tensor:
            return softmax_experts(tensors, at, x, 2, False, tensors.get(f"{at}.expert_bias"))

        return qwen3_like(tensors, config, IDS, None, False, experts)

    expected = forward(rounded(folder, "expert_bias"))
    assert_alike(served(folder)(IDS[None])[0], expected)
    assert forward(rounded(folder)).argmax(-1).equal(expected.argmax(-1)) is not biased


@pytest.mark.parametrize("architecture", [SDAR, SDAR_MOE])
def test_sdar(tmp_path: Path, architecture: str) -> None:
    """Its norms multiply by their weights before they go back to the states' type, unlike Qwen3's."""
    folder = write_decoder(tmp_path / "m", architecture)
    config = decoder_config(architecture, tiny_tokenizer().get_vocab_size() + 1)
    tensors = rounded(folder)

    def feed_forward(at: str, x: Tensor) -> Tensor:
        return mlp(tensors, at, x) if architecture == SDAR else softmax_experts(tensors, at, x, 2, True, None)

    mask = block_mask(len(IDS), config["block_size"])
    expected = qwen3_like(tensors, config, IDS, mask, True, feed_forward)
    found = served(folder)(IDS[None])[0]
    assert_alike(found, expected)
    as_qwen3 = qwen3_like(tensors, config, IDS, mask, False, feed_forward)
    assert (as_qwen3 == expected).float().mean() < 0.5


def test_llada(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", n_heads=4, n_kv_heads=2)
    config = tiny_config(tiny_tokenizer().get_vocab_size(), n_heads=4, n_kv_heads=2)
    assert_alike(served(folder)(IDS[None])[0], llada(rounded(folder), config, IDS))


def test_fast_dllm_v2(tmp_path: Path) -> None:
    """Against transformers' Qwen2, whose frequencies stay float32."""
    folder = write_decoder(tmp_path / "m", FAST_DLLM)
    theirs: Any = in_transformers(load_network(folder, torch.device("cpu"), torch.float32)[2])
    frequencies = theirs.model.rotary_emb.inv_freq.clone()
    theirs.to(BF16)
    theirs.model.rotary_emb.inv_freq = frequencies
    expected = theirs(IDS[None], attention_mask=block_mask(len(IDS), 16).to(BF16)).logits[0]
    assert_alike(served(folder)(IDS[None])[0], expected)


def routers_biases(network: Network) -> list[Tensor]:
    return [tensor for name, tensor in network.state_dict().items() if name.endswith("expert_bias")]


@pytest.mark.parametrize("config", [llada2_config(), llada_moe_config(moe_router_enable_expert_bias=True)])
def test_biases_of_routers_stay_float32_however_a_network_gets_its_type(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = with_bias(write_model(tmp_path / "m", config), "expert_bias", 0.005)
    expected = [value for name, value in sorted(load_file(folder / WEIGHTS).items()) if name.endswith("expert_bias")]
    cpu = torch.device("cpu")
    for dtype in (BF16, torch.float16):
        loaded = load_network(folder, cpu, dtype)[2]
        converted = load_network(folder, cpu, torch.float32)[2].to(dtype)
        for network in (loaded, converted):
            assert {p.dtype for p in network.parameters()} == {dtype}
            assert all(a.equal(b) for a, b in zip(routers_biases(network), expected, strict=True))
        drawn = load_network(folder, cpu, dtype, load_format="dummy")[2]
        assert {bias.dtype for bias in routers_biases(drawn)} == {torch.float32}
        assert {p.dtype for p in drawn.parameters()} == {dtype}
