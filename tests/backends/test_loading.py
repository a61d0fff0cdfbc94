"""Folders into models, and what is wrong with a folder in one line."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.files.atomic import write_together
from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import next_query
from server.backends import loading
from server.backends.loading import ModelError, choose_device, choose_dtype, load_model, load_network
from tests.tiny import tiny_tokenizer, write_tiny_model

Break = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def network_of(model: Path, dtype: str = "float32", load_format: str = "auto") -> torch.nn.Module:
    return load_network(model, torch.device("cpu"), getattr(torch, dtype), load_format=load_format)[2]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> None:
    """Split the weights over two files with an index."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    (folder / WEIGHTS).unlink()
    weight_map = {name: file for file, mine in parts.items() for name in mine}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_folder(folder: Path) -> None:
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    info = loaded.backend.info
    vocabulary = tiny_tokenizer().get_vocab_size()
    assert loaded.name == "model"
    assert (info.architecture, info.device, info.dtype) == ("LLaDAModelLM", "cpu", "float32")
    assert (info.max_length, info.vocab_size, info.mask_id, info.end_ids) == (256, vocabulary, 0, {1})
    assert info.block_length is None
    assert info.parameters == sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())
    assert loaded.text.vocab_size == vocabulary
    sampler = get_sampler("topk")
    row = Row(Canvas.blank(loaded.text.encode("Tom"), 4, 0), sampler, sampler.Params())
    assert len(loaded.backend.predict(next_query([row])).token) == 4


def test_the_weights_are_those_of_the_file_and_stay_so(folder: Path) -> None:
    expected = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    network = network_of(folder, dtype="float32")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: -len(content) // 2] + b"\xff" * (len(content) // 2))
    state = network.state_dict()
    assert all(state[name].equal(value) for name, value in expected.items())
    assert not any(p.requires_grad or p.is_meta for p in network.parameters())


def test_what_is_replaced_while_it_is_read_is_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could have the configuration of one and the weights of the other."""
    config, give = (folder / "config.json").read_text(), loading.fill_weights

    def overtaken(*args: Any) -> None:
        write_together(
            folder, {"model.safetensors": (folder / "model.safetensors").read_bytes(), "config.json": config.encode()}
        )
        give(*args)

    monkeypatch.setattr(loading, "fill_weights", overtaken)
    with pytest.raises(ModelError, match="another model was written here while this one was read"):
        load_model(str(folder), device="cpu")


def test_shards(folder: Path) -> None:
    expected = network_of(folder, dtype="float32").state_dict()
    shard(folder)
    state = network_of(folder, dtype="float32").state_dict()
    assert all(state[name].equal(value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_number_types(folder: Path, dtype: str) -> None:
    network = network_of(folder, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {getattr(torch, dtype)}


def test_the_context_can_be_limited_but_not_stretched(folder: Path) -> None:
    lengths = [load_model(str(folder), max_model_len=limit).backend.info.max_length for limit in (None, 100, 9999)]
    assert lengths == [256, 100, 256]


def test_all_ends_are_found(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["<|eot_id|>"])
    size = tokenizer.get_vocab_size()
    write_tiny_model(folder, vocab_size=size, embedding_size=size, eos_token_id=[1, 5])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load_model(str(folder)).backend.info.end_ids == {1, 5, 7, size - 1}


def test_a_model_without_an_architecture_goes_by_its_type(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=None)
    assert load_model(str(folder)).backend.info.architecture == "LLaDAModelLM"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def claim(path: Path, length: int) -> None:
    """A header that says it is that long."""
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])


def claim_tensor(path: Path) -> None:
    """A header that says a tensor has 10^15 bytes."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [250 * 10**12], "data_offsets": [0, 10**15]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{nope"), "config.json: not a JSON file"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not a JSON file"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not a JSON file"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "config empty": (lambda f: (f / "config.json").write_text("{}"), "config.json: names no architecture"),
    "other architecture": (
        lambda f: edit_json(f / "config.json", architectures=["LlamaForCausalLM"]),
        "architecture 'LlamaForCausalLM' is not supported; supported: LLaDAModelLM",
    ),
    "other type": (lambda f: edit_json(f / "config.json", model_type="llama"), "model_type 'llama' is not supported"),
    "experts": (
        lambda f: edit_json(f / "config.json", architectures=["DreamModel"], model_type="Dream", num_experts=64),
        "architecture 'DreamModel' with experts (num_experts = 64) is not supported",
    ),
    "a key missing": (
        lambda f: (f / "config.json").write_text(
            json.dumps({k: v for k, v in json.loads((f / "config.json").read_text()).items() if k != "d_model"})
        ),
        "config.json: d_model: Field required",
    ),
    "a key of the wrong type": (lambda f: edit_json(f / "config.json", n_layers="many"), "config.json: n_layers: "),
    "a variant": (lambda f: edit_json(f / "config.json", alibi=True), "config.json: alibi = True is a variant"),
    "mask outside": (
        lambda f: edit_json(f / "config.json", mask_token_id=10**6),
        "config.json: mask_token_id = 1000000 is outside the vocabulary",
    ),
    "mask is end": (lambda f: edit_json(f / "config.json", mask_token_id=1), "token 1 is both mask and end-of-text"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "tokenizer too large": (
        lambda f: write_tiny_model(f, vocab_size=300, embedding_size=300),
        "but the model's vocabulary ends at 299",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors: no such file"),
    "pickled weights": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is not read, only safetensors are",
    ),
    "truncated": (lambda f: truncate(f / WEIGHTS), "model.safetensors: not a whole safetensors file"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors: not a whole safetensors file"),
    "header of 10^15": (lambda f: claim(f / WEIGHTS, 10**15), "model.safetensors: not a whole safetensors file"),
    "header of 2^63": (lambda f: claim(f / WEIGHTS, 2**63), "model.safetensors: not a whole safetensors file"),
    "tensor of 10^15": (lambda f: claim_tensor(f / WEIGHTS), "model.safetensors: not a whole safetensors file"),
    "text for weights": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "model.safetensors: not a whole safetensors file",
    ),
    "tensor missing": (
        lambda f: edit_weights(
            f, lambda t: (t.pop("model.transformer.ln_f.weight"), t.pop("model.transformer.wte.weight"))
        ),
        "tensor model.transformer.ln_f.weight and 1 more missing",
    ),
    "tensor unexpected": (
        lambda f: edit_weights(f, lambda t: t.update(extra=torch.zeros(1))),
        "tensor extra unexpected",
    ),
    "wrong shape": (
        lambda f: edit_weights(f, lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(3)})),
        "tensor model.transformer.ln_f.weight has shape [3], but config.json says [32]",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({"model.transformer.ln_f.weight": torch.ones(32).long()})),
        "tensor model.transformer.ln_f.weight is I64, which is not supported",
    ),
    "shard missing": (
        lambda f: (shard(f), (f / "b.safetensors").unlink()),
        "b.safetensors: no such file",
    ),
    "shard elsewhere": (
        lambda f: (shard(f), edit_json(f / INDEX, weight_map={"x": "../model.safetensors"})),
        "'../model.safetensors' is not the name of a safetensors file in the same folder",
    ),
    "shard a pickle": (
        lambda f: (shard(f), edit_json(f / INDEX, weight_map={"x": "pytorch_model.bin"})),
        "'pytorch_model.bin' is not the name of a safetensors file",
    ),
    "index empty": (lambda f: (shard(f), (f / INDEX).write_text("{}")), f"{INDEX}: has no weight_map"),
    "tensor twice": (
        lambda f: (shard(f), (f / "b.safetensors").write_bytes((f / "a.safetensors").read_bytes())),
        "is in a.safetensors too",
    ),
    "ends no numbers": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
        "generation_config.json: eos_token_id is neither a number nor a list of numbers",
    ),
    "end outside": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [99999]}'),
        "generation_config.json: eos_token_id 99999 is outside the vocabulary",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_told_in_one_line(folder: Path, name: str) -> None:
    destroy, message = BROKEN[name]
    destroy(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu")
    line = str(caught.value)
    assert message in line and "\n" not in line and len(line) < 400
    assert str(folder) in line, "the file or the folder is named"


def test_no_code_of_a_folder_runs(folder: Path) -> None:
    (folder / "modeling_llada.py").write_text("raise SystemExit('ran')")
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_llada.LLaDAModelLM"})
    load_model(str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummy_weights_need_no_safetensors(folder: Path, dtype: str) -> None:
    shapes = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
    (folder / WEIGHTS).unlink()
    drawn = network_of(folder, dtype=dtype, load_format="dummy").state_dict()
    assert {name: tensor.shape for name, tensor in drawn.items()} == shapes
    for name, tensor in drawn.items():
        assert str(tensor.dtype) == f"torch.{dtype}" and tensor.device.type == "cpu"
        if tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
        else:
            assert 0.015 < tensor.float().std() < 0.025 and tensor.float().mean().abs() < 0.005, name
    again = network_of(folder, dtype=dtype, load_format="dummy").state_dict()
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_dummy_weights_still_need_a_tokenizer_and_a_configuration(folder: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (folder / name).rename(folder / "aside")
        with pytest.raises(ModelError, match=name):
            load_model(str(folder), load_format="dummy")
        (folder / "aside").rename(folder / name)


LOAD_AND_MEASURE = """
import sys
from server.backends.loading import load_model

def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
load_model(sys.argv[1], device="cpu", dtype="float32", load_format=sys.argv[2])
print(peak() - before, "torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_loading_takes_the_memory_of_the_weights_once_and_leaves_the_compiler_alone(
    tmp_path: Path, load_format: str
) -> None:
    """Importing torch's compiler would take as long as torch itself."""
    shape = {"d_model": 512, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 2048}
    folder = write_tiny_model(tmp_path / "larger", **shape)
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), load_format]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    grown, compiler = done.stdout.split()
    assert compiler == "False"
    assert int(grown) < 1.5 * (folder / WEIGHTS).stat().st_size


def test_the_embedded_model_has_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loading, "files", lambda package: tmp_path)
    with pytest.raises(ModelError, match="embedded: the embedded model is not there"):
        load_model(None)
    folder.rename(tmp_path / "embedded")
    assert load_model(None).name == "unmask-tiny"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "nowhere: no such folder"),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("../x", "../x: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("no spaces allowed", "neither a folder nor the id of a model"),
        ("nobody/nothing", "nobody/nothing: no such folder, and the Hugging Face hub cannot be asked"),
    ],
)
def test_models_that_are_not_there(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_in_the_hubs_cache_is_served_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    folder.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert load_model("someone/tiny").name == "someone/tiny"


def test_only_data_is_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert load_model("someone/model").name == "someone/model"
    assert asked["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
    assert "trust_remote_code" not in asked


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="not a folder"):
        load_model(str(folder / WEIGHTS))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu9", "unknown device 'tpu9'"),
        ("meta", "device 'meta' is not supported"),
        ("cuda:99", "device 'cuda:99' is not there"),
    ],
)
def test_devices_that_are_not_there(device: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        choose_device(device)


def test_auto_takes_what_the_machine_is_good_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    for capabilities, expected in (
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert choose_dtype("auto", torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose from auto, float32"),
        ({"engine": "onnx"}, "unknown engine 'onnx'"),
        ({"load_format": "pt"}, "unknown load format 'pt'; choose from auto, dummy"),
    ],
)
def test_options_that_are_not_there(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(folder), **options)
