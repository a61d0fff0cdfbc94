"""LLaDA-MoE: its mixture against the same by hand, and which files it is chosen for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import describe, load_model
from server.backends.torch.backend import TorchBackend
from server.models.experts import SoftmaxMixture, highest, mix
from server.models.families.llada_moe import LLaDAMoE, LLaDAMoEConfig
from server.models.families.registry import find_family
from tests.tiny_moe import ROLE_END, llada_moe, llada_moe_config, write_model


def states(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(count))


def mixture_of(**changes: Any) -> SoftmaxMixture:
    mixture = llada_moe(**changes).model.layers[0].mlp
    assert isinstance(mixture, SoftmaxMixture)
    return mixture


def by_hand(mixture: SoftmaxMixture, x: Tensor, count: int) -> Tensor:
    """Token by token, expert by expert, every one of them computed."""
    rows = []
    for token in x:
        scores = (mixture.gate.weight @ token).softmax(dim=0)
        if mixture.expert_bias is not None:
            scores = scores + mixture.expert_bias
        chosen = sorted(range(len(scores)), key=lambda e: -float(scores[e]))[:count]
        row = torch.zeros_like(token)
        for e, expert in enumerate(mixture.experts):
            made = expert(token[None])[0]
            if e in chosen:
                row = row + scores[e] * made
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 2, 50])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts_per_tok": 1}, {"num_experts_per_tok": 8}, {"moe_router_enable_expert_bias": True}],
)
def test_the_mixture_is_the_sum_over_the_chosen_experts(tokens: int, changes: dict[str, Any]) -> None:
    mixture, x = mixture_of(**changes), states(tokens)
    expected = by_hand(mixture, x, changes.get("num_experts_per_tok", 2))
    assert torch.allclose(mixture(x), expected, atol=1e-5)
    assert expected.std() > 0.05, "the comparison is not one of zeros"


def test_weights_are_not_normalised() -> None:
    """Experts that all return the same leave exactly the sum of the chosen probabilities."""
    mixture, x = mixture_of(), states(20)
    mixture.experts = nn.ModuleList(nn.Identity() for _ in mixture.experts)
    share = mixture.gate(x).softmax(dim=-1).topk(2, dim=-1).values.sum(dim=-1, keepdim=True)
    assert torch.allclose(mixture(x), share * x, atol=1e-6)
    assert float(share.min()) < 0.9


def test_what_shares_the_batch_does_not_matter() -> None:
    mixture, x = mixture_of(), states(40)
    together = mixture(x)
    for i in (0, 7, 39):
        assert torch.allclose(mixture(x[i : i + 1]), together[i : i + 1], atol=1e-6)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(mixture(x[order]), together[order], atol=1e-6)


def test_only_experts_with_tokens_are_computed_each_once() -> None:
    calls: list[tuple[int, int]] = []

    class Watched(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: Tensor) -> Tensor:
            calls.append((self.index, len(x)))
            return x * (self.index + 1)

    chosen = torch.tensor([[3, 0], [0, 5], [5, 3]])
    weight = torch.tensor([[0.5, 1.0], [2.0, 1.0], [1.0, 0.25]])
    out = mix([Watched(i) for i in range(7)], torch.ones(3, 4), chosen, weight)
    assert calls == [(0, 2), (3, 2), (5, 2)]
    assert out[:, 0].tolist() == [0.5 * 4 + 1, 2 + 6, 6 + 0.25 * 4]


def test_sums_are_rounded_like_the_originals_one_expert_after_the_other() -> None:
    """In half precision 1 + 1/256 is 1, so that the order and the roundings in between show."""
    parts = [1.0, 2.0**-8, 2.0**-8]

    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return torch.full_like(x, self.value)

    x, weight = torch.zeros(1, 4, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16)
    forwards = mix([Constant(v) for v in parts], x, torch.tensor([[2, 0, 1]]), weight)
    backwards = mix([Constant(v) for v in reversed(parts)], x, torch.tensor([[2, 0, 1]]), weight)
    assert forwards[0, 0].item() == 1.0 and backwards[0, 0].item() == 1.0 + 2.0**-7
    wide = mix([Constant(v) for v in parts], x, torch.tensor([[2, 0, 1]]), weight.float())
    assert wide.dtype == torch.float32 and wide[0, 0].item() == 1 + 2.0**-7


def test_among_equals_the_lower_index_is_chosen() -> None:
    scores = torch.zeros(2, 64)
    scores[1, 50] = 1.0
    assert highest(scores, 3).tolist() == [[0, 1, 2], [50, 0, 1]]


def test_tensors_have_the_checkpoints_names() -> None:
    names = set(llada_moe(moe_layer_freq=[0, 1], shared_expert_intermediate_size=16).state_dict())
    layers = {name.partition("layers.")[2] for name in names if "layers" in name}
    assert {"0.mlp.gate_proj.weight", "1.mlp.gate.weight", "1.mlp.experts.7.down_proj.weight"} <= layers
    assert {"1.shared_expert.up_proj.weight", "0.self_attn.q_norm.weight"} <= layers
    assert not any(name.startswith("0.shared_expert") for name in layers)
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names


def test_a_shared_expert_stands_beside_the_mixture() -> None:
    network = llada_moe(shared_expert_intermediate_size=16)
    layer, h = network.model.layers[1], states(9)
    assert torch.allclose(layer.feed_forward(h), layer.mlp(h) + layer.shared_expert(h), atol=1e-6)
    assert layer.shared_expert(h).abs().mean() > 0.01


def test_every_position_sees_every_other() -> None:
    network = llada_moe()
    ids = torch.arange(2, 14)[None]
    other = ids.clone()
    other[0, -1] = 80
    assert not torch.allclose(network(ids)[0, 0], network(other)[0, 0], atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_generates(tmp_path: Path, dtype: str) -> None:
    loaded = load_model(str(write_model(tmp_path / "m", llada_moe_config())), device="cpu", dtype=dtype)
    info = loaded.backend.info
    assert (info.architecture, info.block_length, info.pattern.causal_block) == ("LLaDAMoEModelLM", None, None)
    assert info.end_ids == {1, loaded.text.token_id(ROLE_END)}
    sampler = get_sampler("topk")
    row = Row(Canvas.blank([5, 6, 7], 12, info.mask_id, 4), sampler, sampler.Params(k=2))
    finish([row], loaded.backend.predict)
    assert not row.canvas.masked.any() and 0 not in row.canvas.generated


def test_alone_and_in_a_batch_the_same_tokens() -> None:
    network = llada_moe()
    backend = TorchBackend(network, describe("LLaDAMoEModelLM", network))
    sampler = get_sampler("threshold")

    def rows() -> list[Row]:
        canvases = [Canvas.blank(list(range(5, 8 + i)), 10 + i, 0, 5) for i in range(5)]
        return [Row(canvas, sampler, sampler.Params(threshold=0.6)) for canvas in canvases]

    together = rows()
    finish(together, backend.predict)
    for row, expected in zip(rows(), together, strict=True):
        finish([row], backend.predict)
        assert row.canvas.tokens.equal(expected.canvas.tokens) and row.forwards == expected.forwards


PUBLISHED = {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "lladamoe",
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "expert_intermediate_size": 1024,
    "eos_token_id": 156892,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "vocab_size": 157184,
}


def test_the_published_configuration_is_accepted() -> None:
    config = LLaDAMoEConfig.model_validate(PUBLISHED | {"mask_token_id": 156895})
    assert (config.mask_token_id, config.end_ids, config.head_size) == (156895, {156892}, 128)
    assert (config.rotated_size, config.intermediate_size, config.max_length) == (128, 8192, 8192)


@pytest.mark.parametrize("name", ["LLaDAModelLM", "LLaDAMoEModel", "LLaDAMoEModelLM"])
@pytest.mark.parametrize("model_type", ["llada", "lladamoe", None])
def test_older_files_carry_the_dense_models_names(name: str, model_type: str | None) -> None:
    config = PUBLISHED | {"architectures": [name], "model_type": model_type}
    found, family = find_family(config)
    assert found == "LLaDAMoEModelLM" and family.network is LLaDAMoE


def test_another_type_is_another_model() -> None:
    with pytest.raises(ValueError, match="model_type 'olmoe' is not supported for architecture 'LLaDAMoEModelLM'"):
        find_family(PUBLISHED | {"model_type": "olmoe"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is a variant that is not built"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function = 'sigmoid'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'}"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"moe_layer_freq": [1]}, "moe_layer_freq has 1 entries for num_hidden_layers = 2"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 is more than num_experts = 8"),
        ({"partial_rotary_factor": -1}, "greater than 0"),
        ({"mask_token_id": 156895}, "mask_token_id = 156895 is outside the vocabulary of 90"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LLaDAMoEConfig.model_validate(llada_moe_config(**change))
    assert message in str(caught.value)
