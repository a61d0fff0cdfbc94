"""`unmask generate`: one completion in the terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from server.commands.options import (
    MOST_LENGTH,
    Cache,
    Chat,
    Device,
    Dtype,
    FillAfterEnd,
    Model,
    Policies,
    Threads,
    encode_prompt,
    fail_with_cause,
    open_model,
    open_policies,
    parse_block_length,
    progress_console,
    split_policies,
    use_threads,
    wrong,
)

if TYPE_CHECKING:
    from policies.evaluation.sampler_spec import ModifierSpec, SamplerSpec
    from samplers.forward.query import Predict
    from samplers.loop.event import StepEvent
    from samplers.loop.row import Row


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: Model = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", help="See `unmask samplers`. Default: threshold, or the model's own.")
    ] = None,
    sampler_params: Annotated[
        str, typer.Option("--sampler-params", help="The sampler's parameters.", metavar="JSON")
    ] = "{}",
    modifier: Annotated[
        list[str] | None,
        typer.Option(
            "--modifier",
            help="What is around the sampler, such as guidance:scale=1.5 (repeatable, in this order).",
            metavar="NAME[:PARAM=VALUE,...]",
        ),
    ] = None,
    block_length: Annotated[
        str | None,
        typer.Option("--block-length", help="Positions denoised together; full or 0: all. Default: the model's own."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=MOST_LENGTH, help="Longest text, in tokens.")
    ] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Draw from the likeliest of this mass.")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from this many likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="The generation's random stream.")] = 0,
    policy: Policies = None,
    cache: Cache = None,
    fill_after_end: FillAfterEnd = True,
    chat: Chat = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show the canvas settle, on standard error.")] = False,
    pause: Annotated[
        float, typer.Option("--pause", min=0, max=3600, help="Seconds between two pictures of --watch.")
    ] = 0.1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Complete a prompt: the text on standard output, what it took on standard error."""
    block = parse_block_length(block_length) if block_length is not None else None
    spec = None if sampler is None else _spec(sampler, sampler_params)
    around = _modifiers(modifier or [])
    named = split_policies(policy)
    if top_p == 0:
        wrong("--top-p", "must be above 0")
    from policies.serving.resources import resources_of
    from samplers import CacheMode, Canvas, ParameterError, SamplerError, TokenChoice, get_sampler
    from samplers.loop.row import Row
    from samplers.resources import bound

    use_threads(threads)
    loaded = open_model(model, device, dtype)
    info, text = loaded.backend.info, loaded.text
    spec = spec or _spec(info.sampler, sampler_params)
    # The newline that a shell's echo adds is no part of a prompt.
    ids = encode_prompt(text, sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt, chat)
    if info.mask_id is not None and info.mask_id in ids:
        wrong("PROMPT", f"has the mask token {text.token(info.mask_id)}, and only the text after it is filled in")
    if len(ids) + max_tokens > info.max_length:
        wrong("--max-tokens", f"{max_tokens} and a prompt of {len(ids)} tokens exceed the model's {info.max_length}")
    block = info.blocks(info.block_length if block_length is None else block)
    try:
        canvas = Canvas.blank(ids, max_tokens, info.mask_id, block, pattern=info.pattern, max_length=info.max_length)
    except ValueError as error:
        wrong("--block-length", error)
    choice = TokenChoice(temperature, top_p, top_k)
    policies = open_policies(named, model, loaded)
    try:
        rule = bound(get_sampler(spec.name), spec.params, resources_of(policies))
        mode = CacheMode(cache or info.cache)
        modifiers = [each.bound(partial(encode_prompt, text, chat=chat)) for each in around]
        ends, vocab_size = info.end_ids, info.vocab_size
        row = Row(canvas, rule, spec.params, choice, seed, ends, fill_after_end, mode, vocab_size, modifiers)
    except ParameterError as error:
        flag = "--sampler" if error.field in ("sampler", "temperature") else "--sampler-params"
        wrong("--modifier" if error.field.startswith("modifiers") else flag, error)
    except SamplerError as error:
        fail_with_cause(error)
    if watch and sys.stderr.isatty():
        seconds = _watch(row, loaded.backend.predict, text.token, pause)
    else:
        seconds = sum(took for _, took in steps(row, loaded.backend.predict))
    typer.echo(text.decode(row.text_tokens()))
    typer.echo(
        f"{row.completion_tokens} tokens, {row.forwards} forwards, "
        f"{row.completion_tokens / row.forwards:.2f} tokens per forward, {seconds:.2f} s",
        err=True,
    )


def steps(row: "Row", predict: "Predict") -> "Iterator[tuple[StepEvent, float]]":
    """Denoise a generation to its end; what each forward did, and the seconds it took."""
    from samplers.loop.run import run

    began = time.monotonic()
    for turn in run([row], predict):
        took = time.monotonic() - began
        for i, (_, event) in enumerate(turn):
            if event.error is not None:
                fail_with_cause(event.error)
            yield event, 0.0 if i else took
        began = time.monotonic()


def _watch(row: "Row", predict: "Predict", token: Callable[[int], str], pause: float) -> float:
    """Denoise in a live view; seconds spent on the steps alone."""
    from rich.live import Live

    from server.commands.watch import CanvasView

    view, seconds = CanvasView(row, token), 0.0
    with Live(view, console=progress_console(), auto_refresh=False) as live:
        for event, took in steps(row, predict):
            seconds += took
            view.show(event)
            live.refresh()
            time.sleep(pause)
    return seconds


def _modifiers(given: list[str]) -> "list[ModifierSpec]":
    from policies.evaluation.sampler_spec import ModifierSpec, refuse_twice
    from samplers import UnknownModifierError

    try:
        found = [ModifierSpec.parse(text) for text in given]
        refuse_twice([each.name for each in found])
        return found
    except (UnknownModifierError, ValueError) as error:
        wrong("--modifier", error)


def _spec(sampler: str, params: str) -> "SamplerSpec":
    """The chosen sampler with validated parameters, or a word on which flag is wrong."""
    from policies.evaluation.sampler_spec import SamplerSpec
    from samplers import UnknownSamplerError, get_sampler

    try:
        get_sampler(sampler)
    except UnknownSamplerError as error:
        wrong("--sampler", error)
    try:
        values = json.loads(params)
        if not isinstance(values, dict):
            raise ValueError(f"{params} is not a JSON object")
        return SamplerSpec.create(sampler, values)
    except json.JSONDecodeError as error:
        wrong("--sampler-params", f"not JSON: {error}")
    except (ValueError, RecursionError) as error:
        wrong("--sampler-params", error)
