"""Options and error handling shared by several commands."""

import os
import sys
import traceback
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console

from server.settings import MAX_THREADS, THREADS, THREADS_DEFAULT, name_and_folder

if TYPE_CHECKING:
    from policies.model_under_test import ModelUnderTest
    from policies.serving.store import PolicyStore
    from server.backends.loading import LoadedModel
    from server.models.text.codec import TextCodec

MOST_COUNT, MOST_LENGTH = 1_000_000, 2**24
"""Upper bounds of counts (problems, rounds, canvases) and of lengths in positions: more is a typing error."""

Model = Annotated[
    str | None,
    typer.Option("--model", help="Folder or Hugging Face hub id; without it the embedded model.", metavar="DIR_OR_ID"),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
FillAfterEnd = Annotated[
    bool,
    typer.Option(
        "--fill-after-end/--no-fill-after-end",
        help="Settle everything after a committed end-of-text at once, or denoise that padding like text.",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Send prompts as a user's message, through the model's chat template.")
]
Policies = Annotated[
    list[str] | None,
    typer.Option("--policy", help="A trained policy, for --sampler policy (repeatable).", metavar="NAME=DIR"),
]
Cache = Annotated[
    Literal["none", "prefix", "dual"] | None,
    typer.Option(
        "--cache",
        help="What is kept of a block's first forward: nothing; all before the block; all but the block. Default: what "
        "is exact, prefix for a block-causal model and none for others.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=MAX_THREADS, help=f"{THREADS} {THREADS_DEFAULT}")]
TrainingThreads = Annotated[int, typer.Option("--threads", min=1, max=MAX_THREADS, help=THREADS)]


def fail(message: object) -> NoReturn:
    """End the command with exit status 1 and one line on standard error."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1)


def fail_with_cause(error: Exception, what: str = "") -> NoReturn:
    """End the command like `fail`, after the traceback of the error's cause, if any, such as a sampler's exception."""
    if error.__cause__ is not None:
        typer.echo("".join(traceback.format_exception(error.__cause__)), err=True, nl=False)
    fail(f"{what}: {error}" if what else error)


def wrong(flag: str, message: object) -> NoReturn:
    """End the command with exit status 2: usage error in a flag."""
    raise typer.BadParameter(str(message), param_hint=f"'{flag}'")


def parse_block_length(text: str) -> int | None:
    """Parse a number of positions; `full` or 0 is full diffusion, returned as None."""
    if text in ("full", "0"):
        return None
    if not text.isdecimal():
        wrong("--block-length", f"{text[:100]!r} is neither a number of positions nor 'full'")
    if len(text) > 20 or int(text) > MOST_LENGTH:
        wrong("--block-length", f"{text[:20]} is more than {MOST_LENGTH}")
    return int(text)


def check_file(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, before hours of work go into it."""
    if path is None:
        return
    if path.is_dir():
        wrong(flag, f"{path} is a folder")
    if not path.absolute().parent.is_dir():
        wrong(flag, f"{path.absolute().parent} is not a folder")
    if not path.exists():
        _check_writable(flag, path.absolute().parent)
        return
    try:
        path.open("ab").close()
    except OSError as error:
        wrong(flag, f"{path}: {error.strerror}")


def check_folder(flag: str, path: Path) -> None:
    """Refuse a folder that cannot be created or written to. Creates nothing yet."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not there.is_dir():
        wrong(flag, f"{there} is not a folder")
    _check_writable(flag, there)


def _check_writable(flag: str, folder: Path) -> None:
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        wrong(flag, f"{folder} cannot be written to: {error.strerror}")


def open_model(model: str | None, device: str, dtype: str) -> "LoadedModel":
    """Load a model, or end the command with the reason."""
    from server.backends.loading import ModelError, load_model

    try:
        return load_model(model, device=device, dtype=dtype)
    except ModelError as error:
        fail(error)


def use_threads(threads: int | None) -> None:
    """Set torch's number of CPU threads, or limit its default to the container's quota."""
    import torch

    from server.runtime.processors import quota
    from server.runtime.waiting import sleep_where_crowded

    chosen = threads is not None or "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if not chosen and quota() < torch.get_num_threads():
        threads = max(1, int(quota()))
    if threads is not None:
        torch.set_num_threads(threads)
    sleep_where_crowded()


def results_console() -> Console:
    """Console on standard output for tables; wide unless a terminal gives its width, so that nothing is cut."""
    return Console() if sys.stdout.isatty() else Console(width=140)


def progress_console() -> Console:
    """Console on standard error for progress bars and live views."""
    return Console(stderr=True)


def split_policies(given: list[str] | None) -> list[tuple[str, Path]]:
    """Pairs of name and folder. Usage errors end the command."""
    try:
        return [(name, Path(folder)) for name, folder in map(name_and_folder, given or [])]
    except ValueError as error:
        wrong("--policy", error)


def open_policies(given: list[tuple[str, Path]], model: str | None, loaded: "LoadedModel") -> "PolicyStore":
    """Store of the embedded model's built-in policies and the given ones, or end the command with the reason."""
    from policies.serving.checkpoint import PolicyError
    from policies.serving.store import PolicyStore, ServedModel

    info = loaded.backend.info
    policies = PolicyStore(ServedModel(info.architecture, info.vocab_size), info.loop_device)
    try:
        if model is None:
            policies.load_zoo()
        for name, folder in given:
            policies.load(name, folder)
    except PolicyError as error:
        fail(error)
    return policies


def encode_prompt(text: "TextCodec", content: str, chat: bool) -> list[int]:
    """Token ids of a prompt: with the special tokens the tokenizer adds to texts, or as the message of a chat.

    Ends the command with the reason if the chat template refuses the prompt.
    """
    from server.models.text.codec import ChatTemplateError

    if not chat:
        return text.encode(content, add_special_tokens=True)
    try:
        return text.encode_chat([{"role": "user", "content": content}])
    except ChatTemplateError as error:
        fail(error)


def model_under_test(loaded: "LoadedModel", chat: bool = False) -> "ModelUnderTest":
    """Wrap a loaded model for evaluation and training. With `chat`, prompts go through its template."""
    from policies.model_under_test import ModelUnderTest

    info, text = loaded.backend.info, loaded.text
    prompt = partial(encode_prompt, text, chat=chat)
    end_ids = info.end_ids
    return ModelUnderTest(
        loaded.backend.predict,
        text.encode,
        text.decode,
        info.mask_id,
        end_ids,
        info.max_length,
        prompt,
        info.pattern,
    )
