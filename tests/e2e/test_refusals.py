"""What `unmask serve` says when it cannot start; in this process, which spares starting one a case."""

import shutil
import socket
from pathlib import Path

import pytest

from server.cli import create_cli


@pytest.fixture(autouse=True)
def _own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runner keeps its own handlers."""
    monkeypatch.setattr("server.runtime.logging.configure_logging", lambda form: None)


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Run a command that must end with this status; what it says on stderr."""
    with pytest.raises(SystemExit) as ended:
        create_cli()(list(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == status, err
    assert out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--policy", "a"], "'--policy'"),
        (["--max-batch", "0"], "'--max-batch'"),
        (["--port", "http"], "'--port'"),
        (["--engine", "onnx"], "'--engine'"),
        (["--engine", "vllm", "--cache", "dual"], "'--cache'"),
        (["--engine", "vllm", "--batch-invariant"], "'--batch-invariant'"),
        (["--engine", "vllm", "--compile"], "'--compile'"),
        (["--vllm-args", '{"tensor_parallel_size": 2}'], "'--vllm-args'"),
        (["--engine", "vllm", "--vllm-args", "2"], "'--vllm-args'"),
        (["--load-format", "pt"], "'--load-format'"),
        (["--cache", "always"], "'--cache'"),
        (["--dtype", "int4"], "'--dtype'"),
        (["--log-format", "xml"], "'--log-format'"),
        (["--sampler", "nope"], "'--sampler'"),
        (["--sampler-params", "k=2"], "'--sampler-params'"),
        (["--sampler", "topk", "--sampler-params", '{"k": 0}'], "'--sampler-params'"),
        (["--config", "/nowhere.toml"], "'--config'"),
    ],
)
def test_wrong_use_names_the_flag(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert said in refused(capsys, 2, "serve", *arguments)


def test_wrong_environment_names_the_variable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_MAX_QUEUE", "many")
    assert "'UNMASK_MAX_QUEUE'" in refused(capsys, 2, "serve")


@pytest.mark.parametrize("variable", ["UNMASK_API_KEY", "UNMASK_ADMIN_KEY"])
def test_an_empty_key_is_no_open_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "")
    said = refused(capsys, 2, "serve", "--model", "/nowhere")
    assert f"'{variable}'" in said and "no key" in said


@pytest.mark.parametrize("broken", ["no folder", "no model", "truncated", "mismatched", "no tokenizer"])
def test_a_model_that_is_none_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path, broken: str
) -> None:
    model = tmp_path / "model"
    if broken == "no model":
        model.mkdir()
    elif broken != "no folder":
        shutil.copytree(tiny_model, model)
    if broken == "truncated":
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    if broken == "mismatched":
        config = model / "config.json"
        config.write_text(config.read_text().replace('"n_layers": 2', '"n_layers": 3'))
    if broken == "no tokenizer":
        (model / "tokenizer.json").unlink()
    said = refused(capsys, 1, "serve", "--model", str(model), "--port", "0")
    assert said.startswith("Error: ") and said.count("\n") == 1
    assert str(model) in said


def test_the_vllm_engine_without_vllm_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.backends.loading.find_spec", lambda name: None)
    said = refused(capsys, 1, "serve", "--engine", "vllm", "--port", "0")
    assert said.startswith("Error: ") and said.count("\n") == 1
    assert "pip install '.[vllm]'" in said


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = refused(capsys, 1, "serve", "--model", str(tiny_model), "--port", port)
    assert said.count("\n") == 1
    assert f"port {port}" in said and "--port" in said


def test_health_where_no_server_is(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", "nonsense"):
        assert url in refused(capsys, 1, "health", "--url", url)
