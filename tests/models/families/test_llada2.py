"""LLaDA2: its router and mixture by hand, blocks that are exact under a cache, and folders that are served."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers import CacheMode, Canvas, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import ModelError, describe, load_model
from server.backends.torch.backend import TorchBackend
from server.models.checkpoint import weights
from server.models.families.llada2 import LLaDA2Config, Mixture, Router
from tests.backends.test_loading import LOAD_AND_MEASURE, WEIGHTS, shard
from tests.engine import arrivals
from tests.tiny_moe import ROLE_END, llada2, llada2_config, write_model


def states(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(count))


def mixture_of(**changes: Any) -> Mixture:
    mixture = llada2(**changes).model.layers[1].mlp
    assert isinstance(mixture, Mixture)
    return mixture


def chosen_by_hand(scores: list[float], groups: int, kept: int, count: int) -> list[int]:
    """Experts of the best groups, a group being worth its two best, by scores that the bias is part of."""
    size = len(scores) // groups
    worth = [sum(sorted(scores[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: -worth[g])[:kept]
    allowed = [e for e in range(len(scores)) if e // size in best]
    return sorted(allowed, key=lambda e: -scores[e])[:count]


def by_hand(mixture: Mixture, x: Tensor, config: LLaDA2Config) -> Tensor:
    """Token by token, expert by expert, every one of them computed."""
    rows = []
    for token in x:
        scores = (mixture.gate.weight @ token).sigmoid()
        biased = (scores + mixture.gate.expert_bias).tolist()
        chosen = chosen_by_hand(biased, config.n_group, config.topk_group, config.num_experts_per_tok)
        total = sum(float(scores[e]) for e in chosen) if len(chosen) > 1 else 1.0
        row = torch.zeros_like(token)
        for e, expert in enumerate(mixture.experts):
            made = expert(token[None])[0]
            if e in chosen:
                row = row + scores[e] / total * config.routed_scaling_factor * made
        if mixture.shared_experts is not None:
            row = row + mixture.shared_experts(token[None])[0]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_experts_per_tok": 4},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
        {"num_experts": 12, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 4},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2, "routed_scaling_factor": 1.0},
    ],
)
def test_the_mixture_is_the_sum_over_the_chosen_experts(tokens: int, changes: dict[str, Any]) -> None:
    mixture, x = mixture_of(**changes), states(tokens)
    expected = by_hand(mixture, x, LLaDA2Config.model_validate(llada2_config(**changes)))
    assert torch.allclose(mixture(x), expected, atol=1e-5)
    assert expected.std() > 0.05, "the comparison is not one of zeros"


def router_of(logits: list[float], bias: list[float], **changes: Any) -> tuple[list[int], list[float]]:
    """Experts and weights of a token whose logits are these."""
    network = llada2(num_experts=len(logits), **changes)
    router = network.model.layers[1].mlp.gate
    assert isinstance(router, Router)
    router.weight[:, 0] = torch.tensor(logits)
    router.expert_bias.copy_(torch.tensor(bias))
    chosen, weight = router(torch.eye(1, 32))
    return chosen[0].tolist(), weight[0].tolist()


def test_the_bias_changes_the_choice_but_not_the_weight() -> None:
    none = [0.0] * 4
    groups = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    logits = [2.0, 1.0, 0.0, -1.0]
    assert router_of(logits, none, **groups)[0] == [0, 1]
    chosen, weight = router_of(logits, [0.0, 0.0, 0.0, 5.0], **groups)
    assert chosen == [3, 0]
    raw = torch.tensor([-1.0, 2.0]).sigmoid()
    assert weight == pytest.approx((raw / raw.sum()).tolist(), abs=1e-6)


def test_only_experts_of_the_best_groups_are_chosen() -> None:
    """The best expert of all is in a group whose two best are together worth less than the other group's."""
    logits = [5.0, -9.0, 1.0, 1.5]
    chosen, _ = router_of(logits, [0.0] * 4, n_group=2, topk_group=1)
    assert chosen == [3, 2]
    assert router_of(logits, [0.0] * 4, n_group=2, topk_group=2)[0] == [0, 3]


def test_among_equals_the_lower_index_is_chosen() -> None:
    assert router_of([0.0] * 8, [0.0] * 8, n_group=4, topk_group=2)[0] == [0, 1]


def test_negative_scores_of_a_kept_group_come_before_experts_of_the_others() -> None:
    chosen, _ = router_of([1.0, 1.0, 3.0, 3.0], [0.0, 0.0, -9.0, -9.0], n_group=2, topk_group=1)
    assert chosen == [0, 1]
    assert router_of([1.0, 1.0, 3.0, 3.0], [-5.0, -5.0, -9.0, -9.0], n_group=2, topk_group=1)[0] == [0, 1]


def test_the_router_computes_in_full_precision() -> None:
    """Two experts whose logits are alike in half precision."""
    mixture = mixture_of().bfloat16()
    x = states(5).bfloat16()
    logits = mixture.gate.logits(x)
    assert logits.dtype == torch.float32
    assert logits.equal(x.float() @ mixture.gate.weight.float().T)
    assert mixture.gate(x)[1].dtype == torch.float32 and mixture(x).dtype == torch.bfloat16


def test_only_the_first_part_of_a_head_is_rotated() -> None:
    """Without it all positions are alike to a query: then the order of what is before does not matter."""
    network = llada2(partial_rotary_factor=0.5)
    assert network._rotation(4, torch.float32)[0].shape[-1] == 8
    half, whole = network(torch.arange(2, 40)[None]), llada2(partial_rotary_factor=1.0)(torch.arange(2, 40)[None])
    assert not torch.allclose(half, whole, atol=1e-3)


def test_tensors_have_the_checkpoints_names() -> None:
    names = set(llada2().state_dict())
    assert {"model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"} <= names
    layers = {name.partition("layers.")[2] for name in names if "layers" in name}
    assert {"0.mlp.gate_proj.weight", "1.mlp.gate.weight", "1.mlp.gate.expert_bias"} <= layers
    assert {"2.mlp.experts.7.down_proj.weight", "2.mlp.shared_experts.up_proj.weight"} <= layers
    assert {"0.attention.query_key_value.weight", "0.attention.dense.weight"} <= layers
    assert {"0.attention.query_layernorm.weight", "0.post_attention_layernorm.weight"} <= layers
    assert not any(name.startswith("0.mlp.gate.") for name in layers)


def test_a_block_sees_itself_and_what_is_before() -> None:
    network = llada2()
    network.pattern = network.pattern.with_blocks(4)
    ids = torch.arange(2, 14)[None]
    changed = ids.clone()
    changed[0, 6] = 80
    same = [bool(torch.allclose(a, b, atol=1e-5)) for a, b in zip(network(ids)[0], network(changed)[0], strict=True)]
    assert same == [True] * 4 + [False] * 8


RULES: list[tuple[str, dict[str, Any]]] = [
    ("threshold", {"threshold": 0.6}),
    ("edit", {"threshold": 0.5, "edit_threshold": 0.4, "k": 2}),
    ("topk", {"k": 2}),
    ("random", {}),
    ("entropy_bound", {}),
]


def rows(cache: CacheMode, block_length: int | None) -> list[Row]:
    """Generations that differ in prompt, length, rule and seed."""
    found = []
    for i, (name, params) in enumerate(RULES * 2):
        sampler = get_sampler(name)
        pattern = llada2().pattern
        canvas = Canvas.blank(list(range(5, 8 + 3 * i)), 14 + 3 * i, 0, block_length, pattern=pattern)
        params = sampler.Params(**params)
        ends = frozenset({1} if i % 2 else ())
        found.append(Row(canvas, sampler, params, seed=i, end_ids=ends, cache=cache))
    return found


def results(found: list[Row]) -> list[tuple[list[int], int]]:
    return [(row.canvas.tokens.tolist(), row.forwards) for row in found]


@pytest.mark.parametrize("block_length", [None, 8])
def test_the_cache_is_exact_alone_together_and_for_late_comers(block_length: int | None) -> None:
    network = llada2(seed=1)
    backend = TorchBackend(network, describe("LLaDA2MoeModelLM", network))
    expected = rows(CacheMode.NONE, block_length)
    for row in expected:
        finish([row], backend.predict)
    assert len({tuple(row.canvas.generated[:9].tolist()) for row in expected}) == len(expected), "they all differ"
    assert any(row.end is not None for row in expected)
    for cache in CacheMode:
        alone = rows(cache, block_length)
        for row in alone:
            finish([row], backend.predict)
        assert results(alone) == results(expected)
        together = rows(cache, block_length)
        finish(together, backend.predict)
        assert results(together) == results(expected)
        late = rows(cache, block_length)
        arrivals.finish(late, range(len(late)), backend)
        assert results(late) == results(expected)


def test_a_finished_block_is_computed_once() -> None:
    network = llada2()
    backend = TorchBackend(network, describe("LLaDA2MoeModelLM", network))
    sampler = get_sampler("topk")
    fed: list[list[tuple[int, int]]] = []
    for cache in (CacheMode.NONE, CacheMode.PREFIX):
        canvas = Canvas.blank(list(range(5, 15)), 22, 0, 8, pattern=network.pattern)
        row = Row(canvas, sampler, sampler.Params(k=4), cache=cache)
        fed.append([])

        def predict(query: Query) -> Prediction:
            fed[-1].append((query.spans[0].start, query.spans[0].stop))
            return backend.predict(query)

        finish([row], predict)
    assert fed[0] == [(0, 16), (0, 16), (0, 24), (0, 24), (0, 32), (0, 32)]
    assert fed[1] == [(0, 16), (8, 16), (8, 24), (16, 24), (16, 32), (24, 32)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache", list(CacheMode))
def test_a_folder_generates(tmp_path: Path, dtype: str, cache: CacheMode) -> None:
    loaded = load_model(str(write_model(tmp_path / "m", llada2_config())), device="cpu", dtype=dtype)
    info = loaded.backend.info
    assert (info.architecture, info.block_length, info.cache) == ("LLaDA2MoeModelLM", 32, CacheMode.PREFIX)
    assert info.end_ids == {1, loaded.text.token_id(ROLE_END)} and info.pattern.causal_block == 32
    sampler = get_sampler("edit")
    row = Row(
        Canvas.blank([5, 6, 7], 40, info.mask_id, 16, pattern=info.pattern), sampler, sampler.Params(), cache=cache
    )
    finish([row], loaded.backend.predict)
    assert not row.canvas.masked.any() and 0 not in row.canvas.generated


@pytest.mark.parametrize("broken", ["missing", "shape", "truncated", "dense", "capacity"])
def test_wrong_folders_are_told_in_one_line(tmp_path: Path, broken: str) -> None:
    folder = write_model(tmp_path / "m", llada2_config())
    tensors, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    said = {
        "missing": f"tensor {name} missing",
        "shape": f"tensor {name} has shape [16, 31], but config.json says [16, 32]",
        "truncated": "not a whole safetensors file",
        "dense": "tensor model.layers.1.mlp.down_proj.weight missing",
        "capacity": "expert_capacity = 4.0 is a variant that is not built",
    }
    if broken == "missing":
        save_file({key: value for key, value in tensors.items() if key != name}, folder / WEIGHTS)
    elif broken == "shape":
        save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, folder / WEIGHTS)
    elif broken == "truncated":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])
    elif broken == "dense":
        config["first_k_dense_replace"] = 2
    else:
        config["expert_capacity"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu")
    line = str(caught.value)
    assert line.startswith(str(folder)) and "\n" not in line and len(line) < 400
    if broken == "dense":
        assert "the weights do not fit config.json: tensor model.layers.1.mlp.down_proj.weight and 2 more" in line
    else:
        assert said[broken] in line


LIBRARIES = 40_000_000
"""Bytes that the first use of torch and of the tokenizer takes, whatever the model."""


@pytest.mark.parametrize("sharded", [False, True])
def test_loading_takes_the_memory_of_the_weights_once(tmp_path: Path, sharded: bool) -> None:
    """Many small experts, as in the published models."""
    shape = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 16, "num_hidden_layers": 4}
    folder = write_model(tmp_path / "larger", llada2_config(**shape))
    size = (folder / WEIGHTS).stat().st_size
    assert size > 70_000_000
    if sharded:
        shard(folder)
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), "auto"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    grown, _ = done.stdout.split()
    assert size <= int(grown) <= 1.2 * size + LIBRARIES, f"{int(grown) / size:.2f}"


def test_a_file_of_many_tensors_is_opened_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time its list of all tensors is read."""
    folder = write_model(tmp_path / "m", llada2_config(num_experts=64, n_group=8))
    opened: list[Path] = []
    whole = weights._open

    def watched(path: Path) -> Any:
        opened.append(path)
        return whole(path)

    monkeypatch.setattr(weights, "_open", watched)
    load_model(str(folder), device="cpu")
    assert len(load_file(folder / WEIGHTS)) > 400
    assert len(opened) <= 2 + weights.REOPENINGS


PUBLISHED = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "rope_theta": 600000,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "rope_scaling": None,
    "pad_token_id": 156892,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
}


def test_the_published_configuration_is_accepted() -> None:
    config = LLaDA2Config.model_validate(PUBLISHED | {"mask_token_id": 156895})
    assert (config.mask_token_id, config.end_ids, config.rotated_size) == (156895, {156892}, 64)
    assert (config.max_length, config.rows) == (32768, 157184)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_capacity": 2.0}, "expert_capacity = 2.0 is a variant that is not built"),
        ({"block_size": 32}, "block_size = 32"),
        ({"score_function": "softmax"}, "score_function = 'softmax'"),
        ({"router_dtype": "bf16"}, "router_dtype = 'bf16'"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias = False"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'}"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"use_bias": True}, "use_bias = True"),
        ({"use_qkv_bias": True}, "use_qkv_bias = True"),
        ({"use_qk_norm": False}, "use_qk_norm = False"),
        ({"norm_head": True}, "norm_head = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"n_group": 3}, "num_experts = 8 is not n_group = 3 groups of two or more"),
        ({"n_group": 8}, "num_experts = 8 is not n_group = 8 groups of two or more"),
        ({"topk_group": 5}, "topk_group = 5 is more than n_group = 4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is more than the 4 experts of topk_group = 2 groups"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor = 0.2 of head_dim = 16 is not even"),
        ({"mask_token_id": 156895}, "mask_token_id = 156895 is outside the vocabulary of 90"),
    ],
)
def test_variants_that_are_not_built_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LLaDA2Config.model_validate(llada2_config(**change))
    assert message in str(caught.value)
