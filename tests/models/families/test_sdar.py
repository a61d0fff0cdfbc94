"""SDAR's networks against a second opinion, and the variants they refuse."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from samplers import AttentionPattern
from server.models.experts import SoftmaxMixture
from server.models.families.registry import find_family
from server.models.families.sdar import SDARConfig
from server.models.families.sdar_moe import SDARMoEConfig
from tests.decoders import SDAR, SDAR_MOE, block_mask, decoder_config, decoder_network, in_transformers

VOCABULARY = 90


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (SDAR, {}),
        (SDAR, {"block_size": 8, "tie_word_embeddings": True}),
        (SDAR, {"head_dim": None, "num_key_value_heads": 4}),
        (SDAR_MOE, {}),
        (SDAR_MOE, {"norm_topk_prob": False, "num_experts_per_tok": 5}),
        (SDAR_MOE, {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
        (SDAR_MOE, {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    ],
)
def test_logits_equal_those_of_qwen3_under_a_block_causal_mask(architecture: str, changes: dict[str, Any]) -> None:
    config = decoder_config(architecture, VOCABULARY, **changes)
    network = decoder_network(config)
    ids = tokens(3, 30)
    expected = in_transformers(network)(ids, attention_mask=block_mask(30, config["block_size"])).logits
    with torch.no_grad():
        found = network(ids)
    assert (found - expected).abs().max() <= 2e-5
    assert expected.std() > 0.5, "the comparison is not one of zeros"


def test_layers_with_and_without_experts() -> None:
    config = decoder_config(SDAR_MOE, VOCABULARY, num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3])
    network: Any = decoder_network(config)
    mixed = [isinstance(layer.mlp, SoftmaxMixture) for layer in network.model.layers]
    assert mixed == [False, True, False, False, False]


def test_a_block_sees_itself_and_what_is_before_it() -> None:
    network = decoder_network(decoder_config(SDAR, VOCABULARY))
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, 6] = (other[0, 6] + 1) % VOCABULARY
    same = torch.isclose(network(ids), network(other), atol=1e-5).all(dim=-1)[0]
    assert same[:4].all() and not same[4:].any()


def test_it_says_how_it_reads_a_canvas() -> None:
    network = decoder_network(decoder_config(SDAR, VOCABULARY, block_size=8))
    assert (
        network.pattern == AttentionPattern(causal_block=8, judges_drawn=True, strict=True)
        and network.block_length == 8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is a variant that is not built"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads = 3"),
        ({"block_size": 0}, "block_size"),
        ({"mask_token_id": 151669}, "mask_token_id = 151669 is outside"),
        ({"eos_token_id": [1, 99]}, "eos_token_id = 99 is outside"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    for architecture, config in ((SDAR, SDARConfig), (SDAR_MOE, SDARMoEConfig)):
        with pytest.raises(ValidationError) as caught:
            config.model_validate(decoder_config(architecture, VOCABULARY, **change))
        assert message in str(caught.value)


def test_more_experts_a_token_than_there_are() -> None:
    with pytest.raises(ValidationError, match="num_experts_per_tok = 7 is more than num_experts = 6"):
        SDARMoEConfig.model_validate(decoder_config(SDAR_MOE, VOCABULARY, num_experts_per_tok=7))


PUBLISHED: dict[str, Any] = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "block_size": 4,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED_MOE = PUBLISHED | {
    "architectures": ["SDARMoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "model_type": "sdar_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
}


@pytest.mark.parametrize("published", [PUBLISHED, PUBLISHED_MOE])
@pytest.mark.parametrize("named", [True, False])
def test_published_configurations_are_found_and_accepted(published: dict[str, Any], named: bool) -> None:
    """By the architecture's name, or by the type alone; neither file names the mask token."""
    name, family = find_family(published if named else published | {"architectures": None})
    assert [name] == published["architectures"]
    assert family.mask_token_id == 151669
    config = family.network.Config.model_validate(published | {"mask_token_id": family.mask_token_id})
    assert isinstance(config, SDARConfig)
    assert (config.head_size, config.block_size) == (128, 4)
    assert config.end_ids == {151643}


def test_experts_belong_to_the_architecture_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"with experts \(num_experts = 128\) is not supported"):
        find_family(PUBLISHED_MOE | {"architectures": ["SDARForCausalLM"]})
