"""Fast-dLLM v2's network against a second opinion, and the variants it refuses."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from samplers import AttentionPattern, Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends.loading import describe
from server.backends.torch.backend import TorchBackend
from server.models.families.fast_dllm_v2 import FastDLLMConfig
from server.models.families.registry import find_family
from tests.decoders import FAST_DLLM, block_mask, decoder_config, decoder_network, in_transformers

VOCABULARY = 90


@pytest.mark.parametrize("changes", [{}, {"bd_size": 8, "tie_word_embeddings": True}, {"layer_types": None}])
def test_logits_equal_those_of_qwen2_under_a_block_causal_mask(changes: dict[str, Any]) -> None:
    config = decoder_config(FAST_DLLM, VOCABULARY, **changes)
    network = decoder_network(config)
    ids = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = in_transformers(network)(ids, attention_mask=block_mask(40, config["bd_size"])).logits
    with torch.no_grad():
        found = network(ids)
    assert (found - expected).abs().max() <= 2e-5
    assert expected.std() > 0.5, "the comparison is not one of zeros"


@pytest.mark.parametrize(("size", "small"), [(32, 8), (16, 8), (8, 8), (12, 12)])
def test_it_says_how_it_reads_a_canvas(size: int, small: int) -> None:
    network = decoder_network(decoder_config(FAST_DLLM, VOCABULARY, bd_size=size))
    assert network.pattern == AttentionPattern(
        causal_block=size, fixed=True, shifted=True, judges_drawn=True, strict=True
    )
    assert network.block_length == small


def test_a_position_is_decided_by_the_one_before_it() -> None:
    """Of a block that begins with masks its first position only, by the last position of the block before."""
    network = decoder_network(decoder_config(FAST_DLLM, VOCABULARY))
    backend = TorchBackend(network, describe(FAST_DLLM, network))
    sampler = get_sampler("topk")
    for prompt, asked in ((list(range(5, 21)), [16]), (list(range(5, 18)), [13, 14, 15])):
        canvas = Canvas.blank(prompt, 10, 0, 8, pattern=network.pattern)
        query = next_query([Row(canvas, sampler, sampler.Params())])
        assert query.position.tolist() == asked
        logits = in_transformers(network)(canvas.tokens[None], attention_mask=block_mask(len(canvas.tokens), 16)).logits
        expected = logits[0, [p - 1 for p in asked]].softmax(dim=-1).max(dim=-1)
        found = backend.predict(query)
        assert found.token.equal(expected.indices) and torch.allclose(found.confidence, expected.values, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with 'sliding_attention'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"bd_size": 0}, "bd_size"),
        ({"mask_token_id": 151665}, "mask_token_id = 151665 is outside"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        FastDLLMConfig.model_validate(decoder_config(FAST_DLLM, VOCABULARY, **change))
    assert message in str(caught.value)


def test_the_published_configuration_is_found_and_accepted() -> None:
    published = {
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "attention_dropout": 0.0,
        "bd_size": 32,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "Fast_dLLM_Qwen",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 151645,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    _, family = find_family(published)
    assert family.mask_token_id == 151665
    config = family.network.Config.model_validate(published | {"mask_token_id": family.mask_token_id})
    assert isinstance(config, FastDLLMConfig)
    assert (config.end_ids, config.bd_size) == ({151645}, 32)
