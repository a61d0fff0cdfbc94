"""DiffusionGemma's network against a second opinion, in parts against itself whole, and the variants it refuses."""

import json
from collections.abc import Callable
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
from samplers.forward.statistics import NOTHING
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query, run
from server.backends.loading import describe, load_model, load_network
from server.backends.torch.backend import TorchBackend
from server.models.checkpoint.compiling import compile_layers
from server.models.families.diffusion_gemma import DiffusionGemma, DiffusionGemmaConfig
from server.models.files import ModelError
from server.models.ragged_batch import KeyValues, RaggedBatch, Segment
from tests.tiny_gemma import CANVAS, WINDOW, tiny_gemma, tiny_gemma_config, write_tiny_gemma

VOCABULARY = 90
CPU = torch.device("cpu")


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def ours(network: DiffusionGemma, prompt: Tensor, draft: Tensor, said: Tensor | None = None) -> Tensor:
    """Logits [draft, vocabulary] of one draft after one prompt, given the logits said before."""
    first, length = len(prompt), len(prompt) + len(draft)
    memory = network.new_kv_cache(length, network.decoder.embed_tokens.weight.dtype, CPU)
    if said is not None:
        memory.self_conditioning = first, network.self_conditioning(said, NOTHING)
    row = Segment(0, length, len(draft), length, memory, draft=first)
    hidden = network.packed(RaggedBatch([row], torch.cat([prompt, draft]), torch.arange(first, length)))
    return network.head(hidden)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers' own, random, which has a vision tower too."""
    pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma")
    from transformers import DiffusionGemmaConfig as Config
    from transformers import DiffusionGemmaForBlockDiffusion

    text = tiny_gemma_config(VOCABULARY)["text_config"]
    del text["per_layer_config"]
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"num_key_value_heads": 1, "head_dim": 16, "patch_size": 4, "position_embedding_size": 16}
    config = Config(
        text_config=text | {"global_head_dim": 16, "num_global_key_value_heads": 1},
        vision_config=vision | {"model_type": "gemma4_vision"},
        canvas_length=CANVAS,
    )
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(config).eval().requires_grad_(False)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith(("model.decoder", "model.encoder.language_model")) and p.is_floating_point():
            if p.dim() > 1:
                p.normal_(0, 1.0 if "embed_tokens" in name else 0.2)
            elif not name.endswith(("inv_freq", "embed_scale")):
                p.uniform_(0.7, 1.3)
    folder = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    return folder


def both(folder: Path, dtype: torch.dtype) -> tuple[Any, DiffusionGemma]:
    """transformers' model of a checkpoint, and ours."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=dtype)
    _, _, network = load_network(folder, CPU, dtype)
    assert isinstance(network, DiffusionGemma)
    return model.eval().requires_grad_(False), network


@pytest.fixture(scope="module")
def theirs(written: Path) -> tuple[Any, DiffusionGemma]:
    return both(written, torch.float32)


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_logits_equal_those_of_transformers(theirs: tuple[Any, DiffusionGemma], length: int) -> None:
    """Prompts shorter and longer than the window; a first step, and one that knows what was said before."""
    model, network = theirs
    prompt, draft = tokens(2, length), tokens(2, CANVAS, seed=2)
    for said in (None, torch.randn(2, CANVAS, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3):
        expected = model(input_ids=prompt, decoder_input_ids=draft, self_conditioning_logits=said)
        for i in range(2):
            found = ours(network, prompt[i], draft[i], None if said is None else said[i])
            assert torch.allclose(found, expected.logits[i], atol=1e-4)
            row = Segment(0, length, length, length, draft=length)
            encoded = network.packed(RaggedBatch([row], prompt[i], torch.arange(length)))
            assert torch.allclose(encoded, expected.encoder_last_hidden_state[i], atol=1e-4)
    assert expected.logits.std() > 1, "logits that are all alike would agree whatever the network does"


def test_half_precision_is_rounded_where_transformers_rounds(written: Path) -> None:
    """Part by part to the last bit; the whole is as near as two orders of an attention's sum are."""
    model, network = both(written, torch.bfloat16)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    decoder = model.model.decoder
    for theirs, layer in zip(decoder.layers, network.decoder.layers, strict=True):
        _, shares, chosen = theirs.router(x)
        weights, experts = layer.router(x)
        assert weights.dtype == shares.dtype == torch.float32
        assert weights.equal(shares) and experts.equal(chosen)
        assert layer.experts(x, weights, experts).equal(theirs.experts(x, chosen, shares))
        assert layer.mlp(x).equal(theirs.mlp(x))
        assert layer.input_layernorm(x).equal(theirs.input_layernorm(x))
        assert layer.layer_scalar.equal(theirs.layer_scalar)
    ids = tokens(20)
    assert (network.decoder.embed_tokens(ids) * network._factor).equal(decoder.embed_tokens(ids))
    signal = x.flip(0)
    assert network.decoder.self_conditioning(x, signal).equal(decoder.self_conditioning(x, signal))
    prompt, draft = tokens(1, 3 * WINDOW), tokens(1, CANVAS, seed=2)
    for said in (None, torch.randn(1, CANVAS, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 3):
        half = None if said is None else said.to(torch.bfloat16)  # as its own loop hands them on
        expected = model(input_ids=prompt, decoder_input_ids=draft, self_conditioning_logits=half).logits[0]
        found = ours(network, prompt[0], draft[0], None if said is None else said[0])
        assert found.dtype == expected.dtype == torch.float32
        assert (found - expected).abs().mean() < 0.02 * expected.std()


def small() -> TorchBackend:
    network = tiny_gemma(tiny_gemma_config(VOCABULARY))
    return TorchBackend(network, describe("DiffusionGemmaForBlockDiffusion", network))


def row(backend: TorchBackend, seed: int, cache: CacheMode = CacheMode.PREFIX, gen_length: int = 20) -> Row:
    """A generation of three canvases, the last of which is cut."""
    sampler = get_sampler("diffusion_gemma")
    canvas = Canvas.blank(tokens(5 + seed, seed=seed).tolist(), gen_length, None, pattern=backend.info.pattern)
    params = sampler.Params(max_denoising_steps=4, entropy_bound=3.0)
    return Row(canvas, sampler, params, seed=seed, cache=cache)


def test_a_canvas_is_as_long_as_the_models_unless_somebody_says_otherwise() -> None:
    backend = small()
    assert [row(backend, 0).canvas.layout.block_size(b) for b in range(3)] == [CANVAS] * 3
    canvas = Canvas.blank([1], 20, None, 5, pattern=backend.info.pattern)
    assert canvas.layout.blocks == 4


@pytest.mark.parametrize("cache", list(CacheMode))
def test_what_is_kept_changes_no_token(cache: CacheMode) -> None:
    """Finished canvases are computed once, or in every forward: the same tokens, steps and drafts."""
    backend = small()
    kept, whole = row(backend, 3, cache), row(backend, 3, CacheMode.NONE)
    steps = (run([each], backend.predict) for each in (kept, whole))
    for ((_, first),), ((_, second),) in zip(*steps, strict=True):
        assert first.error is second.error is None
        assert (first.tokens, first.draft) == (second.tokens, second.draft)
        assert kept.canvas.tokens.equal(whole.canvas.tokens)
    assert whole.finished


def test_alone_and_among_others_of_other_ages() -> None:
    backend = small()
    together = [row(backend, seed, gen_length=6 + 3 * seed) for seed in range(5)]
    finish(together[:2], backend.predict)
    late = [row(backend, seed, gen_length=6 + 3 * seed) for seed in range(2)]
    finish([*together[2:], *late], backend.predict)
    for seed, each in enumerate(together):
        alone = row(backend, seed, gen_length=6 + 3 * seed)
        finish([alone], backend.predict)
        assert alone.canvas.tokens.equal(each.canvas.tokens)
        assert alone.forwards == each.forwards
    assert all(a.canvas.tokens.equal(b.canvas.tokens) for a, b in zip(late, together, strict=False))


def test_bitwise_the_same_whoever_shares_the_batch() -> None:
    """`--batch-invariant`: each row on its own, what is kept of it too."""
    backend = small()
    strict = TorchBackend(backend.network, backend.info, batch_invariant=True)
    together, alone = [row(strict, seed) for seed in range(3)], row(strict, 1)
    said: list[Tensor] = []

    def predict(query: Query) -> Prediction:
        found = strict.predict(query)
        said.append(found.confidence[query.row == (1 if len(query.canvases) == 3 else 0)])
        return found

    for _ in zip(range(6), run(together, predict), run([alone], predict), strict=False):
        assert said[-2].equal(said[-1])
    assert len(said) == 12


def test_what_was_said_before_counts_within_a_canvas_and_not_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the second step of a canvas says something else, and the first the same."""
    backend = small()

    def confidences(each: Row) -> list[list[float]]:
        found = []

        def predict(query: Query) -> Prediction:
            prediction = backend.predict(query)
            found.append(prediction.top[:, 0].tolist() if prediction.top is not None else [])
            return prediction

        for _ in zip(range(5), run([each], predict), strict=False):
            pass
        return found

    told = confidences(row(backend, 1))
    monkeypatch.setattr(DiffusionGemma, "self_conditioning", lambda *_: None)
    untold = confidences(row(backend, 1))
    assert told[0] == untold[0] and told[1] != untold[1]


@pytest.mark.parametrize(("begins", "counts"), [(4, True), (3, False)])
def test_what_was_said_of_a_block_that_began_elsewhere_is_of_no_interest(begins: int, counts: bool) -> None:
    network = small().network

    def hidden(said: tuple[int, Tensor] | None) -> Tensor:
        memory = KeyValues(network.new_kv_cache(4 + CANVAS, torch.float32, CPU).states, said)
        row = Segment(0, 4 + CANVAS, CANVAS, 4 + CANVAS, memory, draft=4)
        return network.packed(RaggedBatch([row], tokens(4 + CANVAS), torch.arange(4, 4 + CANVAS)))

    assert hidden((begins, torch.ones(CANVAS, 32))).equal(hidden(None)) is not counts


def test_a_failed_forward_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying again after a failure in the middle of the statistics gives what would have been without it."""
    backend = small()
    each, other = row(backend, 2), row(backend, 2)
    for one in (each, other):
        for _ in zip(range(2), run([one], backend.predict), strict=False):
            pass
    query = next_query([each])
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "say", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            backend.predict(query)
    assert backend.predict(query).confidence.equal(backend.predict(next_query([other])).confidence)


def test_logits_worked_off_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small()
    whole, parts = row(backend, 4), row(backend, 4)
    finish([whole], backend.predict)
    monkeypatch.setattr("server.backends.torch.backend.LOGIT_ELEMENTS", 3 * VOCABULARY)
    finish([parts], backend.predict)
    assert parts.canvas.tokens.equal(whole.canvas.tokens)


def test_compiled_layers_say_the_same() -> None:
    """In padded forwards; the compiler's front is real, its code generator is left out."""
    plain = small()
    traced = tiny_gemma(tiny_gemma_config(VOCABULARY))
    compile_layers(traced, 128, backend="eager")
    compiled = TorchBackend(traced, plain.info, static_shapes=True)
    ours, theirs = row(plain, 1), row(compiled, 1)
    finish([ours], plain.predict)
    finish([theirs], compiled.predict)
    assert ours.canvas.tokens.equal(theirs.canvas.tokens)


def test_half_precision_runs() -> None:
    network = tiny_gemma(tiny_gemma_config(VOCABULARY))
    wide = ours(network, tokens(9), tokens(CANVAS))
    half = tiny_gemma(tiny_gemma_config(VOCABULARY)).to(torch.bfloat16)
    memory = half.new_kv_cache(9 + CANVAS, torch.bfloat16, CPU)
    batch = RaggedBatch(
        [Segment(0, 17, 8, 17, memory, draft=9)], torch.cat([tokens(9), tokens(CANVAS)]), torch.arange(9, 17)
    )
    logits = half.head(half.packed(batch))
    assert logits.dtype == torch.float32
    assert (logits - wide).abs().mean() < 0.1 * wide.std()


def test_a_checkpoint_loads_without_its_vision_tower(tmp_path: Path) -> None:
    loaded = load_model(str(write_tiny_gemma(tmp_path)), device="cpu", dtype="float32")
    info = loaded.backend.info
    assert (info.mask_id, info.block_length, info.max_length, info.sampler) == (None, CANVAS, 128, "diffusion_gemma")
    assert info.end_ids == {1} and info.cache is CacheMode.PREFIX


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.update({"model.encoder.extra": torch.ones(1)}), "model.encoder.extra unexpected"),
        (lambda tensors: tensors.pop("model.decoder.norm.weight"), "model.decoder.norm.weight missing"),
        (
            lambda tensors: tensors.pop("model.encoder.language_model.layers.1.layer_scalar"),
            "model.encoder.language_model.layers.1.layer_scalar missing",
        ),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], said: str) -> None:
    path = write_tiny_gemma(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=said):
        load_network(tmp_path, CPU, torch.float32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"use_bidirectional_attention": "all"}, "'all'"),
        ({"layer_types": ["full_attention"]}, "1 layer_types"),
        ({"layer_types": ["sliding_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"per_layer_config": {"0": {"head_dim": 12}}}, "another"),
        ({"per_layer_config": {"2": {"sliding_window": 3}}}, "sliding_window"),
        ({"top_k_experts": 9}, "top_k_experts"),
        ({"eos_token_id": 90}, "outside the vocabulary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}}, "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "how sliding_attention rotates"),
    ],
)
def test_variants_that_are_not_built_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DiffusionGemmaConfig.model_validate(tiny_gemma_config(VOCABULARY, **change))


def test_older_files_say_the_full_layers_heads_once(tmp_path: Path) -> None:
    config = json.loads(json.dumps(tiny_gemma_config(VOCABULARY)))
    text = config["text_config"]
    del text["per_layer_config"], text["rope_parameters"]
    text |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    parsed = DiffusionGemmaConfig.model_validate(config).text_config
    assert [parsed.cache_shape(i) for i in range(3)] == [(2, 8), (2, 8), (1, 16)]
    assert parsed.rope_parameters[parsed.kind(2)].partial_rotary_factor == 0.25


@pytest.mark.parametrize(
    "given",
    [
        {"num_hidden_layers": 13},
        {"num_hidden_layers": 6, "num_global_key_value_heads": 2, "global_head_dim": 64},
        {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    ],
)
@pytest.mark.parametrize("null", [True, False])
def test_what_is_left_out_is_as_in_transformers(given: dict[str, Any], null: bool) -> None:
    pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma")
    from transformers import DiffusionGemmaTextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24, "num_attention_heads": 8}
    said = given | sizes | {"num_experts": 4, "top_k_experts": 2}
    theirs = DiffusionGemmaTextConfig(**json.loads(json.dumps(said)))
    keys: tuple[str, ...] = ("vocab_size", "max_position_embeddings", "sliding_window")
    keys += ("rms_norm_eps", "final_logit_softcapping", "hidden_activation", "attention_bias", "eos_token_id")
    nothing = (
        dict.fromkeys((*keys, "head_dim", "num_key_value_heads", "rope_parameters", "per_layer_config")) if null else {}
    )
    ours = DiffusionGemmaConfig.model_validate({"text_config": said | nothing}).text_config
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}
    assert list(ours.layer_types) == list(theirs.layer_types)
    for index, kind in enumerate(theirs.layer_types):
        layer = theirs.per_layer_config[index]
        assert ours.cache_shape(index) == (layer.num_key_value_heads, layer.head_dim)
        rope = ours.rope_parameters[ours.kind(index)]
        expected = {"partial_rotary_factor": 1.0} | theirs.rope_parameters[kind]
        assert rope.model_dump() == expected
