"""Folders and files that cannot be read, and weights that do not fit into memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.backends.loading import ModelError, load_model
from tests.backends.test_loading import INDEX, WEIGHTS, shard
from tests.commands.application import refused
from tests.models.checkpoint.folders import line_of, network_of
from tests.tiny import write_tiny_model


def denied(error: Exception) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    return refuse


def link_to_nowhere(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def folder_in_its_place(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config a folder": (lambda f: folder_in_its_place(f / "config.json"), "config.json: Is a directory"),
    "config a broken link": (lambda f: link_to_nowhere(f / "config.json"), "config.json: No such file or directory"),
    "config empty": (lambda f: (f / "config.json").write_text(" \n"), "config.json: the file is empty"),
    "config cut": (lambda f: (f / "config.json").write_text('{"architectures": ["LLa'), "config.json: not a JSON file"),
    "generation config a broken link": (
        lambda f: link_to_nowhere(f / "generation_config.json"),
        "generation_config.json: No such file or directory",
    ),
    "generation config a folder": (
        lambda f: folder_in_its_place(f / "generation_config.json"),
        "generation_config.json: Is a directory",
    ),
    "tokenizer settings a broken link": (
        lambda f: link_to_nowhere(f / "tokenizer_config.json"),
        "tokenizer_config.json: No such file or directory",
    ),
    "tokenizer settings no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: "),
    "tokenizer a folder": (lambda f: folder_in_its_place(f / "tokenizer.json"), "tokenizer.json: "),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_bytes(b""), "tokenizer.json: "),
    "weights a folder": (lambda f: folder_in_its_place(f / WEIGHTS), f"{WEIGHTS}: Is a directory"),
    "weights a broken link": (lambda f: link_to_nowhere(f / WEIGHTS), f"{WEIGHTS}: no such file"),
    "weights cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]),
        f"{WEIGHTS}: not a whole safetensors file",
    ),
    "index a folder": (lambda f: (shard(f), folder_in_its_place(f / INDEX)), f"{INDEX}: Is a directory"),
    "index cut": (lambda f: (shard(f), (f / INDEX).write_text('{"weight_map": {')), f"{INDEX}: not a JSON file"),
    "shards without an index": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00002.safetensors"),
        f"{WEIGHTS}: no such file, and no {INDEX} for model-00001-of-00002.safetensors",
    ),
    "GGUF only": (
        lambda f: (f / WEIGHTS).rename(f / "model-Q4_K.gguf"),
        "model-Q4_K.gguf is not read, only safetensors",
    ),
    "nothing but GGUF": (
        lambda f: [path.unlink() if path.name != WEIGHTS else path.rename(f / "x.gguf") for path in f.iterdir()],
        "config.json: no such file; x.gguf is not read, only safetensors are",
    ),
    "pickle only": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is not read, only safetensors are",
    ),
    "another name": (
        lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"),
        "consolidated.safetensors is not one of transformers' names",
    ),
    "an adapter": (
        lambda f: ((f / WEIGHTS).rename(f / "adapter_model.safetensors"), (f / "adapter_config.json").write_text("{}")),
        "adapter_config.json belongs to an adapter",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_folders_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = UNREADABLE[name]
    folder = write_tiny_model(tmp_path / "m")
    destroy(folder)
    line = line_of(folder)
    assert message in line and str(folder) in line


def test_a_single_file_counts_more_than_an_index(tmp_path: Path) -> None:
    """As transformers has it; here the index is of shards that are no longer there."""
    folder = write_tiny_model(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    network_of(folder)


NOWHERE = ["~nosuchuser/model", "a\0b", "x" * 5000, "/proc/self/mem/x"]


@pytest.mark.parametrize("model", NOWHERE)
def test_names_that_cannot_be_a_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_nowhere_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to("nowhere")
    assert line_of("model") == "model: a link that leads nowhere"


@pytest.mark.parametrize("call", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Tests may run as root, to whom nothing is forbidden."""
    folder = write_tiny_model(tmp_path / "m")
    monkeypatch.setattr(Path, call, denied(PermissionError(13, "Permission denied", str(folder))))
    assert line_of(folder) == f"{folder}: Permission denied"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", WEIGHTS])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, error: OSError
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text("{}")
    whole = os.open

    def guarded(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name == file:
            raise type(error)(error.errno, error.strerror, str(path))
        return whole(path, *args, **options)

    monkeypatch.setattr(os, "open", guarded)
    assert line_of(folder) == f"{folder / file}: {error.strerror}"


@pytest.mark.parametrize("command", [("generate", "a"), ("evaluate", "--task", "sort", "--sampler", "topk")])
def test_commands_end_with_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = write_tiny_model(tmp_path / "m")
    folder_in_its_place(folder / "config.json")
    said = refused(1, *command, "--model", folder)
    assert said == f"Error: {folder / 'config.json'}: Is a directory"


def test_files_that_may_be_listed_and_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is closed to root, so the system's answer is made up."""
    folder, look = write_tiny_model(tmp_path / "m"), Path.lstat

    def closed(path: Path) -> os.stat_result:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "lstat", closed)
    assert line_of(folder).endswith(": Permission denied")


@pytest.mark.parametrize("name", ["config a folder", "weights cut", "GGUF only"])
def test_serve_ends_with_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = UNREADABLE[name]
    folder = write_tiny_model(tmp_path / "m")
    destroy(folder)
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_weights_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "m")
    errors = (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory\nof 1 EB"),
        MemoryError(),
    )
    for error in errors:
        monkeypatch.setattr("server.backends.loading.load_weights", denied(error))
        assert line_of(folder) == f"{folder}: the weights do not fit into the memory of cpu"
