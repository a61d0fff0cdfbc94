"""Model folders that are meant to hang their reader, to fill its memory, or to make it build what nobody can."""

import json
import os
import re
import socket
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.backends.loading import _check_all_files, build_network, load_model
from server.models.checkpoint.special_tokens import CONFIG, GENERATION
from server.models.checkpoint.weights import SINGLE
from server.models.config import MAX_COUNT, MAX_LAYERS
from server.models.files import MAX_JSON, MAX_TOKENIZER, ModelError
from server.models.text import tokenizer_steps
from server.models.text.tokenizer_files import load_tokenizer
from server.models.text.tokenizer_steps import MAX_STATE
from tests.backends.test_loading import edit_json, shard
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_gemma import write_tiny_gemma
from tests.tiny_moe import llada2_config, llada_moe_config, write_model

pytestmark = pytest.mark.timeout(60)


def line_of(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1100
    return line


# Files that are none.


def bind_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(path.name)
    finally:
        os.chdir(here)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a named pipe, not a file"),
    "link to a pipe": (link_to_pipe, "a named pipe, not a file"),
    "socket": (bind_socket, "a socket, or a device"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "a device, not a file"),
    "folder": (Path.mkdir, "Is a directory"),
    "file without an end": (endless, "more than"),
}
WHOLE = (
    *(CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", SINGLE),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/default.jinja"),
    *("quantize_config.json", "quant_config.json", "hf_quant_config.json"),
)
SLOW = ("vocab.json", "merges.txt")
SHARDED = ("model.safetensors.index.json", "a.safetensors", "b.safetensors")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[str, ...]]:
    """Folders of models, and files that each could have."""
    root = tmp_path_factory.mktemp("models")
    whole, sharded = (write_tiny_model(root / name, chat_template=None) for name in ("whole", "sharded"))
    (whole / "additional_chat_templates").mkdir()
    shard(sharded)
    return {whole: WHOLE, sharded: SHARDED, write_tiny_dream(root / "slow"): SLOW}


@pytest.mark.parametrize("kind", SPECIAL)
def test_every_file_of_a_model_is_a_file_and_has_an_end(folders: dict[Path, tuple[str, ...]], kind: str) -> None:
    make, said = SPECIAL[kind]
    for folder, names in folders.items():
        for name in names:
            path, kept = folder / name, folder.with_name("kept")
            if path.exists():
                path.rename(kept)
            make(path)
            line = line_of(folder)
            if name.endswith(".safetensors") and kind == "file without an end":
                assert "not a whole safetensors file" in line
            else:
                assert said in line and str(path) in line
            path.rmdir() if path.is_dir() else path.unlink()
            path.with_name("pipe").unlink(missing_ok=True)
            if kept.exists():
                kept.rename(path)
        load_model(str(folder), device="cpu")


def test_links_to_files_elsewhere_are_what_the_hubs_cache_is_made_of(tmp_path: Path) -> None:
    blobs = write_tiny_model(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    load_model(str(snapshot), device="cpu")


def test_nothing_but_files_is_handed_to_vllm(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    _check_all_files(folder)
    os.mkfifo(folder / "preprocessor_config.json")
    with pytest.raises(ModelError, match=r"preprocessor_config.json: a named pipe, not a file"):
        _check_all_files(folder)


# JSON that is too much.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": ' + b"[" * 100_000, "not a JSON file"),
        (b'{"d_model": 1' + b"0" * 5000 + b"}", "not a JSON file: Exceeds the limit"),
        (b'{"architectures": ["' + b"x" * 100_000 + b'"]}', "is not supported"),
        (b'{"architectures": ["a\\u2028\\u0007\\nb"]}', "is not supported"),
        (b"[" + b" " * MAX_JSON + b"]", f"more than {MAX_JSON} bytes"),
    ],
)
def test_configurations_that_are_too_much_to_read(tmp_path: Path, content: bytes, said: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / CONFIG).write_bytes(content)
    line = line_of(folder)
    assert said in line and line.isprintable()


# Sizes that nobody has.

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "LLaDA": write_tiny_model,
    "Dream": write_tiny_dream,
    "SDAR": lambda path: write_decoder(path, SDAR),
    "SDAR with experts": lambda path: write_decoder(path, SDAR_MOE),
    "Fast-dLLM": lambda path: write_decoder(path, FAST_DLLM),
    "LLaDA2": lambda path: write_model(path, llada2_config()),
    "LLaDA-MoE": lambda path: write_model(path, llada_moe_config()),
    "DiffusionGemma": write_tiny_gemma,
}
ABSURD = (10**9, 6 * 10**12, 10**18, 10**400, -1, 0, 1e400, float("nan"), "x" * 1000, [[[1]]])
COUNTS = frozenset(
    {
        *("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size"),
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "expert_intermediate_size", "top_k_experts"),
        *("max_sequence_length", "max_position_embeddings", "head_dim", "block_size", "bd_size", "canvas_length"),
        "dense_intermediate_size",
    }
)


@pytest.mark.parametrize("name", FAMILIES)
def test_absurd_sizes_are_refused_before_anything_is_built(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    whole = json.loads((folder / CONFIG).read_text())
    text = whole.get("text_config", whole)
    monkeypatch.setattr(torch.nn.Module, "__init__", built)
    tried = 0
    for part in (whole, text) if text is not whole else (whole,):
        for key in sorted(COUNTS & part.keys()):
            right = part[key]
            for value in ABSURD:
                part[key] = value
                (folder / CONFIG).write_text(json.dumps(whole))
                with pytest.raises(ModelError) as caught:
                    build_network(folder)
                assert str(folder / CONFIG) in str(caught.value) and len(str(caught.value)) < 1100, (key, value)
                tried += 1
            part[key] = right
    assert tried >= 7 * len(ABSURD)


def built(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something is built")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("LLaDA", {"n_layers": MAX_LAYERS + 1}, f"n_layers: Input should be less than or equal to {MAX_LAYERS}"),
        ("LLaDA", {"d_model": 6 * 10**12}, f"d_model: Input should be less than or equal to {MAX_COUNT}"),
        ("LLaDA", {"rope_theta": 1e400}, "rope_theta: "),
        ("LLaDA2", {"num_hidden_layers": 900, "num_experts": 32}, "num_experts = 32 in each of num_hidden_layers"),
        ("LLaDA2", {"num_shared_experts": 10**12}, "num_shared_experts: "),
        ("Dream", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling = "),
    ],
)
def test_sizes_are_refused_by_name(tmp_path: Path, name: str, changes: dict[str, Any], said: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    edit_json(folder / CONFIG, **changes)
    assert said in line_of(folder)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_weights_that_memory_cannot_hold_are_never_made(
    tmp_path: Path, load_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    monkeypatch.setattr("server.models.checkpoint.weights.available_memory", lambda device: 50_000)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", built)
    assert line_of(folder, load_format=load_format) == f"{folder}: the weights do not fit into the memory of cpu"


# Tokenizers.


def edited(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def token(id: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id, "content": "<q>", **flags}


def replace(*contents: str) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": content} for content in contents]
    return {"type": "Sequence", "normalizers": steps}


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": []}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"added_tokens": [token(2**63)]}, "not a tokenizer: "),
        ({"added_tokens": [token(-1)]}, "not a tokenizer: "),
        ({"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}}, "token ids up to 4294967295"),
        ({"model": {"type": "WordLevel", "vocab": {"b": 1}, "unk_token": "none"}}, "not a tokenizer: "),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "not a tokenizer: "),  # it panics
        ({"post_processor": TEMPLATE | {"special_tokens": {}}}, "not a tokenizer: "),  # and here when it is used
        ({"normalizer": replace("a" * 100, "a" * 100, "a" * 100)}, "may make 5000000 characters of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, "may make 5005 characters of one"),
    ],
)
def test_tokenizers_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edited(folder / "tokenizer.json", **changes)
    assert said in line_of(folder)


def around(*pieces: int, texts: int = 1) -> dict[str, Any]:
    """A post-processor that puts special tokens of so many ids each, and so many times the text, together."""
    single: list[dict[str, Any]] = [{"SpecialToken": {"id": f"[{n}]", "type_id": 0}} for n in pieces]
    special = {f"[{n}]": {"id": f"[{n}]", "ids": [1] * n, "tokens": ["x"] * n} for n in set(pieces)}
    single += [{"Sequence": {"id": "A", "type_id": 0}}] * texts
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
PATTERN = {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "b"}
CHARSMAP = b64encode((4).to_bytes(4, "little") + bytes(4) + b"x" * 1000 + b"\0").decode()
SPLIT = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"post_processor": around(*[100] * 100)}, "puts 10000 tokens around a text"),
        ({"post_processor": around(*[1] * 2000)}, "puts 2000 tokens around a text"),
        ({"post_processor": around(texts=2)}, "repeats the text"),
        ({"post_processor": {"type": "Sequence", "processors": [around(600), around(500)]}}, "puts 1100 tokens"),
        ({"normalizer": {"type": "Prepend", "prepend": "x" * (MAX_STATE + 1)}}, "its normalizer has more than"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30}}, f"may make {5**30} characters"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}] * 30}}, f"may make {5**31} char"),
        ({"normalizer": {"type": "Sequence", "normalizers": [PATTERN] * 30}}, f"may make {5 * 2**30} characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}}, "may make 5000 characters"),
        (
            {"decoder": {"type": "Sequence", "decoders": replace(*["a" * 100] * 5)["normalizers"]}},
            "its decoder may make",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT] * 65}}, "its pre-tokenizer has 65 steps"),
    ],
)
def test_tokenizers_that_make_much_of_a_text_do_not_read_one(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edited(folder / "tokenizer.json", **changes)
    with pytest.raises(ModelError, match=re.escape(said)):
        load_tokenizer(folder, {})


def test_a_tokenizer_with_very_many_added_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "m")
    monkeypatch.setattr(tokenizer_steps, "MAX_ADDED", 3)
    edited(folder / "tokenizer.json", added_tokens=[token(1000 + i) | {"content": f"<q{i}>"} for i in range(4)])
    with pytest.raises(ModelError, match="it adds 4 tokens to its vocabulary, more than 3"):
        load_tokenizer(folder, {})


def test_a_tokenizer_that_is_too_large(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    os.truncate(folder / "tokenizer.json", MAX_TOKENIZER + 1)
    assert f"more than {MAX_TOKENIZER} bytes" in line_of(folder)


def test_ids_of_a_slow_tokenizer_that_no_library_can_count(tmp_path: Path) -> None:
    folder = write_tiny_dream(tmp_path / "m")
    edited(folder / "vocab.json", zzz=2**40)
    assert "vocab.json: a token's id is no number from 0 to" in line_of(folder)


def test_messages_are_one_line() -> None:
    assert str(ModelError("a\n\tb\x1b[31m\u2028c")) == "a b [31m c"
