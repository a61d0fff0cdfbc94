"""Server settings. Flags override environment variables, which override the configuration file."""

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from policies.files.regular import read_text

PREFIX = "UNMASK_"
MAX_FILE_BYTES = 1 << 20
MAX_TOKENS, MAX_SECONDS = 2**31 - 1, 10_000_000.0
"""Upper bounds of counts and durations: beyond any sensible value, within what the operating system can represent."""
MAX_QUOTED = 200
"""Characters of a wrong value that an error message repeats."""
MAX_THREADS = 1024
MAX_KEY_LIMIT = 10**12
"""Upper bound of every per-key limit."""
THREADS = "Processor threads that compute."
THREADS_DEFAULT = "Default: one a core, within a container's limit."


def _json_object(value: Any) -> Any:
    """Parse JSON given as text, as in flags and environment variables; a table from a file passes through."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _split(value: Any) -> Any:
    """Split a comma-separated text, the form in which an environment variable holds several values."""
    return value.split(",") if isinstance(value, str) else value


HTTP_WHITESPACE = " \t\n\r\f\v"
"""White space as HTTP defines it. Clients' keys are stripped of it too."""


NO_KEY = "there is no key in it: leave it out altogether to do without"


def _split_keys(value: Any) -> Any:
    """Like `_split`, but drop entries that are empty or only white space, as in a secret mounted from a file.

    A value without any key is an error: a variable meant to hold a secret, but empty, must not leave the server open.
    """
    keys = [key for key in _split(value) if key.strip(HTTP_WHITESPACE)] if isinstance(value, str) else value
    if keys == []:
        raise ValueError(NO_KEY)
    return keys


def _key(value: Any) -> Any:
    """Strip white space around a key. Raises ValueError for a key of invisible characters, which is a mistake."""
    if not isinstance(value, str):
        return value
    if not any(character.isprintable() and not character.isspace() for character in value):
        raise ValueError(NO_KEY)
    return value.strip(HTTP_WHITESPACE)


Key = Annotated[SecretStr, BeforeValidator(_key)]
KEY_FIELDS = ("api_key", "admin_key")
"""Fields that hold keys for authorization."""


def name_and_folder(value: Any) -> Any:
    """Parse NAME=DIR into a pair; values other than text are left to validation. Raises ValueError."""
    if not isinstance(value, str):
        return value
    name, equals, folder = value.partition("=")
    if not (name and equals and folder):
        raise ValueError(f"{value[:MAX_QUOTED]!r} is not NAME=DIR")
    return name, folder


class KeyLimit(BaseModel):
    """Limits of each key; None means that only the server's overall limits apply."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int | None = Field(None, ge=1, le=MAX_KEY_LIMIT)
    queued: int | None = Field(None, ge=0, le=MAX_KEY_LIMIT)
    tokens_per_minute: int | None = Field(None, ge=1, le=MAX_KEY_LIMIT)


def _key_limit(value: Any) -> Any:
    """Parse `rows=4,queued=32,tokens_per_minute=60000` or a table. Raises ValueError that names the mistake."""
    parts = value
    if isinstance(value, str):
        parts = {}
        for part in value.split(","):
            name, equals, number = (text.strip() for text in part.partition("="))
            if not equals or name in parts:
                raise ValueError("write each limit once, as NAME=NUMBER, with commas between them")
            parts[name] = int(number) if len(number) <= len(str(MAX_KEY_LIMIT)) and number.isdecimal() else number
    if not isinstance(parts, dict):
        return value
    if unknown := parts.keys() - KeyLimit.model_fields.keys():
        raise ValueError(f"there is no limit {min(map(str, unknown))!r}; there are {', '.join(KeyLimit.model_fields)}")
    if not parts:
        raise ValueError("there is no limit in it")
    for name, number in parts.items():
        least = 0 if name == "queued" else 1
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= MAX_KEY_LIMIT:
            raise ValueError(f"{name} must be a whole number from {least} to {MAX_KEY_LIMIT}")
    return KeyLimit(**parts)


NamedFolder = Annotated[tuple[str, str], BeforeValidator(name_and_folder)]


class Settings(BaseSettings):
    """Settings. Each field is a flag of `unmask serve`, an `UNMASK_...` variable and a key of a `--config` file."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_ignore_empty=True, allow_inf_nan=False
    )

    model: str | None = Field(
        None, description="Folder or Hugging Face hub id; without it the embedded model.", examples=["DIR_OR_ID"]
    )
    served_name: str | None = Field(
        None, min_length=1, max_length=200, description="Name of the model in the API.", examples=["NAME"]
    )
    engine: Literal["torch", "vllm"] = Field(
        "torch", description="What runs the model: our own code, or vLLM (in a checkout: pip install '.[vllm]')."
    )
    vllm_args: Annotated[dict[str, Any], NoDecode, BeforeValidator(_json_object)] = Field(
        {}, description='Engine arguments of vLLM, such as {"tensor_parallel_size": 2}.', examples=["JSON"]
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="Weights: auto reads safetensors; dummy draws random ones, to try a size out."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Number type of the weights.")
    threads: int | None = Field(None, ge=1, le=MAX_THREADS, description=f"{THREADS} {THREADS_DEFAULT}")
    cache: Literal["none", "prefix", "dual"] | None = Field(
        None,
        description="What is kept of a block's first step, where a request does not say: none; prefix, all before the "
        "block; dual, all but the block. Default: what is exact, prefix for a block-causal model and none for others.",
    )
    max_model_len: int | None = Field(
        None, ge=2, le=MAX_TOKENS, description="Longest canvas, prompt included, in tokens."
    )
    max_batch: int = Field(16, ge=1, le=65536, description="Generations that share a forward pass.")
    max_batch_tokens: int = Field(
        8192,
        ge=2,
        le=MAX_TOKENS,
        description="Tokens of one forward pass over all its rows; what does not fit takes turns. "
        "No canvas can be longer.",
    )
    batch_invariant: bool = Field(
        False, description="Bitwise the same results whatever shares the batch: each row is computed on its own."
    )
    compile: bool = Field(
        False, description="Compile the layers, for few static shapes; the first forward of each shape takes long."
    )
    max_queue: int = Field(
        256,
        ge=1,
        le=1_000_000,
        description="Generations that may wait; more are answered 429, but for those of clients that have less than "
        "their share of it, for which there are as many places again.",
    )
    sampler: str | None = Field(
        None,
        description="Sampler of requests that name none. Default: threshold; without a mask token, the model's own.",
        examples=["NAME"],
    )
    sampler_params: Annotated[dict[str, Any], NoDecode, BeforeValidator(_json_object)] = Field(
        {}, description="Its parameters, where a request gives neither sampler nor parameters.", examples=["JSON"]
    )
    policy: Annotated[tuple[NamedFolder, ...], NoDecode, BeforeValidator(_split)] = Field(
        (), description="A trained policy to serve, as NAME=DIR (repeatable).", examples=["NAME=DIR"]
    )
    policy_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder whose subfolders are policies; watched: new ones and new checkpoints are loaded.",
        examples=["DIR"],
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any that is free.")
    api_key: Annotated[tuple[Key, ...], NoDecode, BeforeValidator(_split_keys)] = Field(
        (), description="A key that clients may use (repeatable); without any, everybody may.", examples=["KEY"]
    )
    admin_key: Key | None = Field(
        None, description="The key that may load and remove policies; without one, nobody may.", examples=["KEY"]
    )
    metrics_open: bool = Field(False, description="Serve /metrics without a key.")
    max_body_bytes: int = Field(
        4 * 1024 * 1024, ge=1, le=MAX_TOKENS, description="Longest request body; longer ones get 413."
    )
    key_limit: Annotated[KeyLimit | None, NoDecode, BeforeValidator(_key_limit)] = Field(
        None,
        description="What each key may have, or each client address where there are no keys: rows, generations that "
        "run at once (more wait); queued, that wait; tokens_per_minute, of prompts and max_tokens. More is answered "
        "429. The admin key has no such limit.",
        examples=["rows=4,queued=32,tokens_per_minute=60000"],
    )
    max_work: int | None = Field(
        None,
        ge=1,
        le=MAX_KEY_LIMIT,
        description="Tokens that forwards may have to compute for one request: of each of its generations, forward "
        "passes at most, times canvas. More is answered 400. Default: no limit.",
    )
    request_timeout: float = Field(
        600.0,
        ge=0,
        le=MAX_SECONDS,
        description="Seconds from its arrival in the queue after which a request, waiting or running, is ended and "
        "answered 504; 0: never.",
    )
    drain_timeout: float = Field(
        60.0,
        ge=0,
        le=MAX_SECONDS,
        description="Seconds that running requests get to finish when the server is asked to stop.",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Open connections; a newcomer beyond ends the one that has been idle longest, or gets 503. "
        "Default: 1024, fewer where the limit on open files says so.",
    )
    header_timeout: float = Field(
        10.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds in which a connection's first request, or the head of one that began, must come.",
    )
    body_timeout: float = Field(
        30.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds in which a request's body must come, or 4096 bytes of it for each.",
    )
    write_timeout: float = Field(
        30.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds after which a client that takes nothing of its answer is cut off, or of a long one less "
        "than 4096 bytes for each.",
    )
    keep_alive: float = Field(
        75.0,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds that a connection may idle between requests; "
        "more than the clients and proxies before the server keep one in their pools.",
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log lines on standard error.")


class WrongSettingError(ValueError):
    """A setting that cannot be used. `where` is the flag, variable or file key that it came from."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def flag(name: str) -> str:
    """Command line flag of a field."""
    return f"--{name.replace('_', '-')}"


def load_settings(flags: dict[str, Any], config: Path | None = None) -> Settings:
    """Load settings from the given flags, the environment and a TOML file. Raises WrongSettingError."""
    from_file = _read(config) if config is not None else {}

    class Sourced(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            empty, file = (InitSettingsSource(settings_cls, init_kwargs=given) for given in (_empty_keys(), from_file))
            return init_settings, empty, env_settings, file

    try:
        return Sourced(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])[:MAX_QUOTED]
        message = first["msg"].removeprefix("Value error, ")
        if name in KEY_FIELDS:
            raise WrongSettingError(_source(name, flags, config), message) from None
        given = json.dumps(first["input"], default=str)
        if len(given) > MAX_QUOTED:
            given = f"{given[:MAX_QUOTED]}..."
        raise WrongSettingError(_source(name, flags, config), f"{message} (got {given})") from None


def _empty_keys() -> dict[str, str]:
    """Key fields whose variables are set but empty, which pydantic would ignore; validation refuses these values."""
    empty = {name.upper() for name, value in os.environ.items() if not value}
    return {name: "" for name in KEY_FIELDS if f"{PREFIX}{name.upper()}" in empty}


def _source(name: str, flags: dict[str, Any], config: Path | None) -> str:
    """The source of a field's value: the first of flag, environment variable and file that sets it."""
    if name in flags:
        return flag(name)
    variable = f"{PREFIX}{name.upper()}"
    return variable if variable in map(str.upper, os.environ) else f"{name} in {config}"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path, MAX_FILE_BYTES))
    except OSError as error:
        raise WrongSettingError("--config", f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise WrongSettingError("--config", f"{path}: not a TOML file: {error}") from None
