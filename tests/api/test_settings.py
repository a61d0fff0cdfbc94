"""Flags over environment over file; an unknown key is an error."""

from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings, WrongSettingError, flag, load_settings


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "unmask.toml"
    path.write_text(
        'port = 1\nmax_batch = 2\nsampler_params = { k = 3 }\napi_key = ["a", "b,c"]\nmetrics_open = true\n'
    )
    return path


def test_flags_count_more_than_the_environment_and_that_more_than_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_PORT", "10")
    monkeypatch.setenv("UNMASK_MAX_BATCH", "20")
    found = load_settings({"port": "100"}, config)
    assert (found.port, found.max_batch, found.sampler_params, found.max_queue) == (100, 20, {"k": 3}, 256)
    assert found.metrics_open is True
    assert [key.get_secret_value() for key in found.api_key] == ["a", "b,c"]


def test_texts_are_parsed_wherever_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_SAMPLER_PARAMS", '{"k": 2}')
    monkeypatch.setenv("UNMASK_API_KEY", "one,two")
    monkeypatch.setenv("UNMASK_METRICS_OPEN", "1")
    monkeypatch.setenv("UNMASK_MODEL", "")
    found = load_settings({"request_timeout": "1.5"})
    assert (found.sampler_params, found.request_timeout, found.metrics_open, found.model) == ({"k": 2}, 1.5, True, None)
    assert [key.get_secret_value() for key in found.api_key] == ["one", "two"]
    assert load_settings({"sampler_params": '{"k": 4}'}).sampler_params == {"k": 4}


def test_keys_do_not_show(config: Path) -> None:
    assert "b,c" not in repr(load_settings({}, config))


def test_settings_cannot_change(config: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings({}).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "environment", "file", "where", "said"),
    [
        ({"port": "x"}, {}, "", "--port", "integer"),
        ({"max_batch": "0"}, {}, "", "--max-batch", "greater than or equal to 1"),
        ({"engine": "onnx"}, {}, "", "--engine", "'torch'"),
        ({"cache": "always"}, {}, "", "--cache", "'none'"),
        ({"request_timeout": "nan"}, {}, "", "--request-timeout", "finite"),
        ({"sampler_params": "{"}, {}, "", "--sampler-params", "not JSON"),
        ({"sampler_params": "[1]"}, {}, "", "--sampler-params", "dictionary"),
        ({"api_key": ["secret", ""]}, {}, "", "--api-key", "no key in it"),
        ({}, {"UNMASK_PORT": "70000"}, "port = 1", "UNMASK_PORT", "65535"),
        ({}, {}, 'api_key = { key = "secret" }', "api_key in ", "tuple"),
        ({}, {}, "max_queue = 0", "max_queue in ", "0"),
        ({}, {}, "max_queu = 5", "max_queu in ", "not permitted"),
        ({}, {}, "= 5", "--config", "not a TOML file"),
    ],
)
def test_a_wrong_setting_says_where_it_is(
    flags: dict[str, Any],
    environment: dict[str, str],
    file: str,
    where: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "unmask.toml"
    path.write_text(file)
    with pytest.raises(WrongSettingError) as caught:
        load_settings(flags, path)
    assert caught.value.where.startswith(where)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["1e400", "1" + "0" * 400, "1" + "0" * 5000, "-1", "nan", "x" * 10_000, "[" * 100_000]
)
@pytest.mark.parametrize(
    "name",
    ["max_model_len", "max_batch", "max_batch_tokens", "request_timeout", "keep_alive", "sampler_params", "policy"],
)
def test_absurd_values_are_told_in_one_line(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, variable = tmp_path / "unmask.toml", f"UNMASK_{name.upper()}"
    path.write_text(f"{name} = {value}\n")
    for way, where in (("flag", flag(name)), ("environment", variable), ("file", "")):
        with monkeypatch.context() as here, pytest.raises(WrongSettingError) as caught:
            if way == "environment":
                here.setenv(variable, value)
            load_settings({name: value} if way == "flag" else {}, path if way == "file" else None)
        assert caught.value.where.startswith(where)
        line = str(caught.value).strip()
        assert len(line) < 600 and "\n" not in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WrongSettingError) as caught:
        load_settings({}, tmp_path / "none.toml")
    assert caught.value.where == "--config"


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert flag(name).startswith("--") and "_" not in flag(name)
