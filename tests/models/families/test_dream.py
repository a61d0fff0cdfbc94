"""Dream's network, checkpoints and decoding against second opinions."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samplers import CacheMode, Canvas, get_sampler
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.loop.row import Row
from samplers.loop.run import finish, next_query, run
from server.backends.loading import LoadedModel, ModelError, describe, load_model
from server.backends.torch.backend import TorchBackend
from server.models.families.dream import Dream, DreamConfig
from server.models.families.registry import find_family
from tests.api.serving import serving
from tests.tiny_dream import tiny_dream, tiny_dream_config, write_tiny_dream

VOCABULARY = 90
Break = Callable[[Path], object]


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> Dream:
    return tiny_dream(tiny_dream_config(VOCABULARY))


@pytest.fixture(scope="module")
def backend(network: Dream) -> TorchBackend:
    return TorchBackend(network, describe("DreamModel", network))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "num_hidden_layers": 3},
    ],
)
def test_logits_equal_those_of_qwen2_without_its_causal_mask(change: dict[str, Any]) -> None:
    """transformers' own Qwen2 under an explicit mask of zeros: the same numbers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = tiny_dream_config(VOCABULARY, **change)
    ours = tiny_dream(config)
    theirs = Qwen2ForCausalLM(
        Qwen2Config(
            **{key: value for key, value in config.items() if not key.startswith(("rope", "arch", "model", "mask"))},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            attn_implementation="sdpa",
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    ids = tokens(3, 40)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.zeros(3, 1, 40, 40)).logits
        found = ours(ids)
    assert (found - expected).abs().max() <= 1e-5
    assert expected.std() > 0.5, "the comparison is not one of zeros"


def test_every_position_sees_every_other(network: Dream) -> None:
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, -1] = ids[0, -1] % (VOCABULARY - 1) + 1
    assert not torch.allclose(network(ids)[0, 0], network(other)[0, 0], atol=1e-4)


def test_half_precision_stays_close(network: Dream) -> None:
    half = tiny_dream(tiny_dream_config(VOCABULARY)).bfloat16()
    ids = tokens(1, 10)
    found, expected = half(ids), network(ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.15 * expected.std()


@pytest.mark.parametrize("prompt", [[], [7, 8, 9]])
def test_a_position_is_decided_by_the_output_before_it(backend: TorchBackend, prompt: list[int]) -> None:
    """The first of the canvas by its own."""
    sampler = get_sampler("topk")
    # A token apart, or all positions of a canvas of masks would be alike.
    row = Row(Canvas.blank(prompt, 6, 0, suffix=[5], pattern=backend.info.pattern), sampler, sampler.Params())
    found = backend.predict(next_query([row]))
    logits = backend.network(row.canvas.tokens[None])[0]
    deciding = [max(0, place - 1) for place in range(len(prompt), len(prompt) + 6)]
    expected = logits[deciding].softmax(dim=-1)
    assert torch.allclose(found.confidence, expected.gather(1, found.token[:, None])[:, 0], atol=1e-5)
    expected[:, 0] = -1
    assert found.token.equal(expected.argmax(dim=-1))
    assert len(found.token.unique()) > 1


def made(backend: TorchBackend, number: int, cache: CacheMode) -> Row:
    """One of several generations that differ in everything."""
    name, params = [("threshold", {"threshold": 0.6}), ("dream", {"steps": 12}), ("topk", {"k": 2})][number % 3]
    sampler = get_sampler(name)
    prompt = tokens(1, 3 + number % 5)[0].tolist()
    canvas = Canvas.blank(prompt, 14 + number, 0, 4 + number % 4, pattern=backend.info.pattern)
    return Row(canvas, sampler, sampler.Params(**params), seed=number, cache=cache)


def test_cached_generations_are_the_same_alone_and_in_a_batch(backend: TorchBackend) -> None:
    modes = list(CacheMode)
    alone, together = ([made(backend, i, modes[i % 3]) for i in range(9)] for _ in range(2))
    for row in alone:
        finish([row], backend.predict)
    finish(together, backend.predict)
    for one, other in zip(alone, together, strict=True):
        assert one.canvas.tokens.equal(other.canvas.tokens) and one.forwards == other.forwards
    assert any(
        not row.canvas.tokens.equal(exact.canvas.tokens)
        for row, exact in zip(
            alone, [finished(made(backend, i, CacheMode.NONE), backend) for i in range(9)], strict=True
        )
    ), "caches that approximate nothing prove nothing"


def finished(row: Row, backend: TorchBackend) -> Row:
    finish([row], backend.predict)
    return row


@pytest.mark.parametrize("mode", [CacheMode.PREFIX, CacheMode.DUAL])
def test_a_cached_blocks_first_forward_decides_its_first_position(backend: TorchBackend, mode: CacheMode) -> None:
    """Whose output is outside of what later forwards feed."""
    sampler = get_sampler("threshold")
    canvas = Canvas.blank([7, 8, 9], 12, 0, 4, pattern=backend.info.pattern)
    row = Row(canvas, sampler, sampler.Params(threshold=1e-9), cache=mode)
    decided, fed = [], []

    def predict(query: Query) -> Prediction:
        fed.append((query.spans[0].start, query.spans[0].stop))
        return backend.predict(query)

    for ((_, event),) in run([row], predict):
        decided.append(event.positions)
    assert decided == [[0], [1, 2, 3], [4], [5, 6, 7], [8], [9, 10, 11]]
    stops = [15, 15, 15] if mode is CacheMode.PREFIX else [7, 11, 15]
    assert fed == [(0, 15), (3, stops[0]), (0, 15), (7, stops[1]), (0, 15), (11, stops[2])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dream(tmp_path_factory.mktemp("models") / "dream")


def loop_alone(loaded: LoadedModel, prompt: str, seed: int, cache: CacheMode) -> list[int]:
    """The region that our loop makes of a prompt, without an engine."""
    info, sampler = loaded.backend.info, get_sampler("dream")
    canvas = Canvas.blank(loaded.text.encode(prompt), 16, info.mask_id, 8, pattern=info.pattern)
    row = Row(canvas, sampler, sampler.Params(), seed=seed, end_ids=info.end_ids, cache=cache)
    finish([row], loaded.backend.predict)
    return row.text_tokens()


@pytest.mark.parametrize("mode", [*CacheMode])
def test_served_tokens_are_those_of_the_loop_alone(folder: Path, mode: CacheMode) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    prompts = ["Tom has 3 apples.", "How many", "Then the answer is so: #### 8", "He buys"]
    expected = [loaded.text.decode(loop_alone(loaded, prompt, 5, mode)) for prompt in prompts]
    assert len(set(expected)) > 1
    fields = {"max_tokens": 16, "block_length": 8, "sampler": "dream", "seed": 5}
    with serving(folder, cache=mode.value) as server, ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: server.complete(prompt=prompt, **fields), prompts))
        chat = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}
        ).json()
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    assert {answer["unmask"]["cache"] for answer in answers} == {mode.value}
    assert chat["usage"]["prompt_tokens"] == len(
        loaded.text.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    )


def test_special_tokens_are_found(tmp_path: Path) -> None:
    """The mask by configuration, else by name; ends by both configurations and by name."""
    named = load_model(str(write_tiny_dream(tmp_path / "named")))
    info, text = named.backend.info, named.text
    assert info.mask_id == text.token_id("<|mask|>")
    assert info.end_ids == {text.token_id("<|endoftext|>"), text.token_id("<|im_end|>")}
    assert (info.architecture, info.pattern.shifted, info.block_length) == ("DreamModel", True, None)
    unnamed = load_model(str(write_tiny_dream(tmp_path / "unnamed", mask_token_id=None))).backend.info
    assert unnamed.mask_id == info.mask_id
    other = load_model(str(write_tiny_dream(tmp_path / "other", mask_token_id=7))).backend.info
    assert other.mask_id == 7


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def no_mask(folder: Path) -> None:
    edit(folder / "config.json", lambda c: c.pop("mask_token_id"))
    edit(folder / "tokenizer_config.json", lambda c: c.pop("added_tokens_decoder"))


def without_biases(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "bias" not in name}, folder / "model.safetensors")


BROKEN: dict[str, tuple[Break, str]] = {
    "no mask anywhere": (
        no_mask,
        "config.json: mask_token_id is not given, and the tokenizer neither declares a mask_token nor has <|mask|>",
    ),
    "rotation": (
        lambda f: edit(f / "config.json", lambda c: c.update(rope_scaling={"type": "yarn", "factor": 4.0})),
        "config.json: rope_scaling = {'type': 'yarn', 'factor': 4.0} is a variant that is not built",
    ),
    "window": (
        lambda f: edit(f / "config.json", lambda c: c.update(use_sliding_window=True)),
        "config.json: use_sliding_window = True is a variant that is not built",
    ),
    "activation": (lambda f: edit(f / "config.json", lambda c: c.update(hidden_act="gelu")), "hidden_act = 'gelu'"),
    "reasoner": (
        lambda f: edit(f / "config.json", lambda c: c.update(architectures=["DreamForCausalLM"])),
        "config.json: architecture 'DreamForCausalLM' is not supported",
    ),
    "no biases": (without_biases, "tensor model.layers.0.self_attn.k_proj.bias and 5 more missing"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: not a whole safetensors file",
    ),
    "other shapes": (
        lambda f: edit(f / "config.json", lambda c: c.update(num_key_value_heads=4)),
        "but config.json says [32",
    ),
    "no tokenizer": (lambda f: (f / "vocab.json").unlink(), "tokenizer.json: no such file"),
    "vocabulary too small": (
        lambda f: edit(f / "config.json", lambda c: c.update(vocab_size=310, mask_token_id=0, eos_token_id=1)),
        "has shape",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = BROKEN[name]
    folder = write_tiny_dream(tmp_path / "model")
    destroy(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu")
    line = str(caught.value)
    assert message in line and "\n" not in line and str(folder) in line


def test_a_configuration_by_its_type_alone() -> None:
    assert find_family({"model_type": "Dream"})[0] == "DreamModel"


def test_the_published_configuration_is_accepted() -> None:
    """The keys of Dream-v0-Instruct-7B's own file."""
    published = {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "mask_token_id": 151666,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pad_token_id": 151643,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    config = DreamConfig.model_validate(published)
    assert (config.mask_token_id, config.head_size, config.rows, config.end_ids) == (151666, 128, 152064, {151643})
