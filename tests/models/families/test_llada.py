"""LLaDA's network against a second opinion, and the variants it refuses."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from server.models.families.llada import LLaDA, LLaDAConfig
from server.models.ragged_batch import RaggedBatch, Segment
from tests.tiny import tiny_config, tiny_network

VOCABULARY = 90
TO_LLAMA = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def to_llama(name: str) -> str:
    """A tensor's name in transformers' Llama."""
    module = name.removesuffix(".weight")
    if module in TO_LLAMA:
        return f"{TO_LLAMA[module]}.weight"
    _, _, _, block, part = module.split(".")
    return f"model.layers.{block}.{TO_LLAMA[part]}.weight"


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "heads",
    [
        {},
        {"n_heads": 4, "n_kv_heads": 2},
        {"n_heads": 4, "n_kv_heads": 1},
        {"n_heads": 4, "n_kv_heads": None, "multi_query_attention": True},
        {"n_heads": 4, "n_kv_heads": None, "multi_query_attention": None},
    ],
)
def test_logits_equal_those_of_llama_without_its_causal_mask(tied: bool, heads: dict[str, Any]) -> None:
    """transformers' own Llama under an explicit mask of zeros: the same numbers, with grouped queries too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    changes = {"rope_theta": 500000.0} | heads
    ours = tied_network(**changes) if tied else tiny_network(tiny_config(VOCABULARY, **changes))
    config = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.rows,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_sequence_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=tied,
            attention_bias=False,
            mlp_bias=False,
            attn_implementation="sdpa",
        )
    ).eval()
    renamed = {to_llama(name): value for name, value in ours.state_dict().items()}
    missing, unexpected = llama.load_state_dict(renamed, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if tied else [])
    ids = tokens(3, 40)
    with torch.no_grad():
        expected = llama(ids, attention_mask=torch.zeros(3, 1, 40, 40)).logits
        found = ours(ids)
        everything = torch.arange(ids.numel())
        packed = ours.head(ours.packed(RaggedBatch([Segment(0, 40, 40, 40)] * 3, ids.flatten(), everything)))
    learnt = ours.requires_grad_(True)(ids).detach()
    for each in (found, packed.view_as(found), learnt):
        assert (each - expected).abs().max() <= 1e-5
    assert expected.std() > 0.5, "the comparison is not one of zeros"


def tied_network(**changes: Any) -> LLaDA:
    config = LLaDAConfig.model_validate(tiny_config(VOCABULARY, weight_tying=True, **changes))
    network = LLaDA(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for p in network.parameters():
        if p.dim() == 2:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    assert "model.transformer.ff_out.weight" not in network.state_dict()
    return network.eval()


@pytest.fixture(scope="module")
def network() -> LLaDA:
    return tiny_network(tiny_config(VOCABULARY))


def test_every_position_sees_every_other(network: LLaDA) -> None:
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % VOCABULARY
    assert not torch.allclose(network(ids)[0, 0], network(other)[0, 0], atol=1e-4)


def test_head_of_selected_rows_is_the_forward_there(network: LLaDA) -> None:
    ids = tokens(2, 15)
    row, position = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 14])
    assert torch.allclose(network.head(network.hidden(ids)[row, position]), network(ids)[row, position], atol=1e-6)


def test_states_of_wanted_positions_are_those_of_the_whole_forward(network: LLaDA) -> None:
    """Rows of different lengths one after the other; positions in any order, as many as each row likes."""
    ids = tokens(3, 15)
    lengths = (9, 15, 15)
    wanted = [[8, 0], [4, 0, 14, 3], [14, 13, 12, 11]]
    rows = [Segment(0, length, len(at), length) for length, at in zip(lengths, wanted, strict=True)]
    parts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    flat = torch.tensor([start + p for start, at in zip((0, 9, 24), wanted, strict=True) for p in at])
    found = network.packed(RaggedBatch(rows, torch.cat(parts), flat))
    expected = [network.hidden(part[None])[0, at] for part, at in zip(parts, wanted, strict=True)]
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def test_rotation_tables_grow_with_the_canvas() -> None:
    network = tiny_network(tiny_config(VOCABULARY, max_sequence_length=16))
    ids = tokens(1, 48)
    short = network(ids[:, :16])
    assert network(ids).shape == (1, 48, VOCABULARY)
    assert network(ids[:, :16]).equal(short)


def test_half_precision_stays_close() -> None:
    full = tiny_network(tiny_config(VOCABULARY))
    half = tiny_network(tiny_config(VOCABULARY)).bfloat16()
    ids = tokens(1, 10)
    found, expected = half(ids), full(ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.15 * expected.std()


def test_rotation_in_full_precision_is_a_choice_of_the_checkpoint() -> None:
    configs = [tiny_config(VOCABULARY, rope_full_precision=full) for full in (True, False)]
    full, cast = (tiny_network(config).bfloat16()(tokens(1, 40)) for config in configs)
    assert not full.equal(cast)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_type": "sequential"}, "block_type = 'sequential' is a variant that is not built"),
        ({"block_group_size": 2}, "block_group_size = 2"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"activation_type": "swiglu"}, "activation_type"),
        ({"alibi": True}, "alibi"),
        ({"rope": False}, "rope"),
        ({"attention_layer_norm": True}, "attention_layer_norm"),
        ({"input_emb_norm": True}, "input_emb_norm"),
        ({"scale_logits": True}, "scale_logits"),
        ({"include_bias": True}, "include_bias"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads = 4 is no multiple of n_kv_heads = 3"),
        ({"n_kv_heads": 2, "multi_query_attention": True}, "n_kv_heads = 2 contradicts multi_query_attention = True"),
        ({"n_kv_heads": 1, "multi_query_attention": False}, "n_kv_heads = 1 contradicts multi_query_attention = False"),
        ({"n_heads": 5, "n_kv_heads": 5}, "does not divide into 5 heads"),
        ({"mask_token_id": VOCABULARY}, f"mask_token_id = {VOCABULARY} is outside the vocabulary"),
        ({"mask_token_id": 126336}, "mask_token_id = 126336 is outside"),
        ({"eos_token_id": -1}, "eos_token_id = -1 is outside"),
        ({"eos_token_id": [1, 99]}, "eos_token_id = 99 is outside"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LLaDAConfig.model_validate(tiny_config(VOCABULARY, **change))
    assert message in str(caught.value)


def test_the_published_configuration_is_accepted() -> None:
    """The keys of LLaDA-8B-Instruct's own file, and the mask token, which it does not name."""
    config = LLaDAConfig.model_validate(
        {
            "activation_type": "silu",
            "alibi": False,
            "attention_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": 4096,
            "embedding_size": 126464,
            "eos_token_id": 126081,
            "include_bias": False,
            "include_qkv_bias": False,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "max_sequence_length": 4096,
            "mlp_hidden_size": 12288,
            "mlp_ratio": 4,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 32,
            "pad_token_id": 126081,
            "rms_norm_eps": 1e-05,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "vocab_size": 126464,
            "mask_token_id": 126336,
            "weight_tying": False,
        }
    )
    assert (config.mask_token_id, config.mlp_width, config.head_dim, config.rows) == (126336, 12288, 128, 126464)
    assert config.end_ids == {126081}
