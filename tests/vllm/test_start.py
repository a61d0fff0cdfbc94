"""Starting on vLLM, and what is said where that is not possible."""

import json
import warnings
from pathlib import Path

import pytest

from samplers import Canvas, get_sampler
from samplers.loop.row import Row
from samplers.loop.run import finish
from server.backends.loading import ModelError, load_model
from server.backends.vllm import backend as vllm_backend
from server.backends.vllm.backend import VllmOptions
from tests.e2e.processes import unmask
from tests.tiny import write_tiny_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def fails(*arguments: str, **environment: str) -> str:
    """What a server that must not start says last."""
    done = unmask("serve", "--engine", "vllm", "--device", "cpu", "--port", "0", *arguments, **environment)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    return last


def test_what_vllm_refuses_in_this_process(tiny_model: Path) -> None:
    said = fails("--model", str(tiny_model), "--vllm-args", '{"quantization": "nope"}')
    assert "Unknown quantization method: nope" in said


def test_what_fails_in_a_process_of_vllms(tiny_model: Path) -> None:
    said = fails("--model", str(tiny_model), VLLM_CPU_OMP_THREADS_BIND="nonsense")
    assert "vLLM does not start: " in said and "nonsense" in said


def test_weights_that_do_not_fit_are_told_before_vllm_starts(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layers": 3}))
    with pytest.raises(ModelError, match="the weights do not fit"):
        load_model(str(folder), "vllm", device="cpu")


def test_a_family_without_a_model_of_vllms_layers(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_backend, "MODELS", {"DreamModel": ""})
    with pytest.raises(ModelError, match="'LLaDAModelLM' does not run on the vllm engine, DreamModel do"):
        load_model(str(tiny_model), "vllm", device="cpu")


def test_arguments_that_are_ours(tiny_model: Path) -> None:
    options = VllmOptions(arguments={"max_model_len": 10})
    with pytest.raises(ModelError, match="'max_model_len' follows from our own settings"):
        load_model(str(tiny_model), "vllm", device="cpu", vllm=options)


def test_random_weights_need_no_safetensors(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", weight_tying=False)
    (folder / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = load_model(str(folder), "vllm", device="cpu", dtype="float32", load_format="dummy").backend
    try:
        sampler = get_sampler("topk")
        row = Row(Canvas.blank([5, 6], 8, 0), sampler, sampler.Params())
        finish([row], backend.predict)
        assert row.finished and 0 not in row.canvas.generated.tolist()
    finally:
        backend.close()
