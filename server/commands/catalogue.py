"""`unmask samplers` and `unmask tasks`: the available samplers and tasks."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from policies.tasks import FILE_SPECS, Split, UnknownTaskError, get_task, list_tasks
from server.commands.options import MOST_COUNT, results_console, wrong

if TYPE_CHECKING:
    from samplers import BrokenPlugin, Modifier, Sampler

    Listed = Sampler | Modifier

tasks_app = typer.Typer(help="Problems with checkable answers.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("samplers")(samplers)
    app.add_typer(tasks_app, name="tasks")


def samplers(
    name: Annotated[str | None, typer.Argument(help="Show this one with all of its parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a list of JSON objects, for programs.")] = False,
) -> None:
    """List the samplers and the modifiers around them, or show one with its parameters."""
    from samplers import UnknownSamplerError, get_sampler, list_modifiers, list_samplers, list_unavailable

    broken = [plugin for plugin in list_unavailable() if name in (None, plugin.name)]
    modifiers = [modifier for modifier in list_modifiers() if name in (None, modifier.name)]
    found = [sampler for sampler in list_samplers() if name in (None, sampler.name)]
    if name is not None and not (broken or modifiers or found):
        try:
            get_sampler(name)
        except UnknownSamplerError as error:
            wrong("NAME", f"{error}; modifiers are {', '.join(each.name for each in list_modifiers())}")
    if as_json:
        entries = [_entry(each, "sampler") for each in found] + list(map(_broken_entry, broken))
        typer.echo(json.dumps(entries + [_entry(each, "modifier") for each in modifiers], indent=1))
    elif name is None:
        results_console().print(_overview("sampler", found, broken), _overview("modifier", modifiers))
    else:
        details = [_details(each, "sampler") for each in found] + [_details(each, "modifier") for each in modifiers]
        results_console().print(*details, *map(_why_not, broken))


def _entry(listed: "Listed", kind: str) -> dict[str, Any]:
    return {
        "id": listed.name,
        "kind": kind,
        "available": True,
        "reason": None,
        "parameters": listed.schema(),
    }


def _broken_entry(plugin: "BrokenPlugin") -> dict[str, Any]:
    reason = f"{plugin.distribution}: {plugin.reason}"
    return {"id": plugin.name, "kind": "sampler", "available": False, "reason": reason, "parameters": {}}


def _overview(kind: str, found: "Sequence[Listed]", broken: "Sequence[BrokenPlugin]" = ()) -> Table:
    table = Table(kind, "what it does", "parameters", "paper", title=f"{kind}s", show_lines=True)
    for each in found:
        stated = [f"{name} = {_default(field)}  ({_range(field)})" for name, field in _fields(each).items()]
        table.add_row(each.name, Text(each.summary()), Text("\n".join(stated)), Text(each.paper))
    for plugin in broken:
        table.add_row(Text(plugin.name, style="dim"), _why_not(plugin), "", "")
    return table


def _why_not(plugin: "BrokenPlugin") -> Text:
    return Text(f"{plugin.name} of {plugin.distribution} could not be loaded: {plugin.reason}")


def _details(listed: "Listed", kind: str) -> Group:
    table = Table("parameter", "default", "values", "meaning")
    for name, field in _fields(listed).items():
        table.add_row(Text(name), Text(_default(field)), Text(_range(field)), Text(field.get("description", "")))
    parameters = table if table.rows else Text("It has no parameters.")
    title = Text.assemble((listed.name, "bold"), "" if kind == "sampler" else f" ({kind})")
    return Group(title, Text(listed.summary()), Text(listed.paper, style="dim"), parameters)


def _fields(listed: "Listed") -> dict[str, dict[str, Any]]:
    """JSON schema of each parameter; `null` as an alternative only says that it may be left out."""
    fields: dict[str, dict[str, Any]] = {}
    for name, field in listed.schema().get("properties", {}).items():
        given = [kind for kind in field.get("anyOf", []) if kind.get("type") != "null"]
        fields[name] = {**field, **given[0]} if len(given) == 1 else field
    return fields


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    return "none" if field["default"] is None else json.dumps(field["default"])


def _range(field: dict[str, Any]) -> str:
    """The values that a parameter may have, in words."""
    if "anyOf" in field:
        return " or ".join(_range(each) for each in field["anyOf"] if each.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    bounds = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = [f"{sign} {field[key]}" for key, sign in bounds if key in field]
    return " ".join([field.get("type", "any"), ", ".join(limits)]).strip()


@tasks_app.command("list")
def tasks_list() -> None:
    """List the tasks."""
    table = Table("task", "generation length", "what it asks", title="tasks", caption=f"from files: {FILE_SPECS}")
    for task in list_tasks():
        table.add_row(task.name, str(task.gen_length), Text(task.description))
    results_console().print(table)


@tasks_app.command("sample")
def tasks_sample(
    task: Annotated[str, typer.Option("--task", help="Name or files of a task (see `unmask tasks list`).")],
    count: Annotated[int, typer.Option("--count", min=1, max=MOST_COUNT, help="How many different problems.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same problems.")] = 0,
    split: Annotated[Split, typer.Option("--split", help="No problem is in both.")] = "heldout",
) -> None:
    """Write problems as JSON lines; `prompt` is exactly what goes to the model."""
    try:
        chosen = get_task(task)
    except (UnknownTaskError, ValueError) as error:
        wrong("--task", error)
    try:
        problems = chosen.problems(count, seed, split)
    except ValueError as error:
        wrong("--count", error)
    for problem in problems:
        line = {"task": chosen.name, "prompt": problem.prompt, "answer": problem.answer, "reference": problem.reference}
        typer.echo(json.dumps(line, ensure_ascii=False))
