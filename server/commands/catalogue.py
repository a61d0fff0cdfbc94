"""`unmask samplers` and `unmask tasks`: the available samplers and tasks."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from policies.tasks import FILE_SPECS, Split, UnknownTaskError, get_task, list_tasks
from server.commands.options import MOST_COUNT, results_console, wrong

if TYPE_CHECKING:
    from samplers import BrokenPlugin, Sampler

tasks_app = typer.Typer(help="Problems with checkable answers.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.command("samplers")(samplers)
    app.add_typer(tasks_app, name="tasks")


def samplers(
    name: Annotated[str | None, typer.Argument(help="Show this one with all of its parameters.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write a list of JSON objects, for programs.")] = False,
) -> None:
    """List the samplers, or show one with its parameters."""
    from samplers import UnknownSamplerError, get_sampler, list_samplers, list_unavailable

    broken = [plugin for plugin in list_unavailable() if name in (None, plugin.name)]
    try:
        found = list_samplers() if name is None else [] if broken else [get_sampler(name)]
    except UnknownSamplerError as error:
        wrong("NAME", error)
    if as_json:
        typer.echo(json.dumps([*map(_entry, found), *map(_broken_entry, broken)], indent=1))
    elif name is None:
        results_console().print(_overview(found, broken))
    else:
        results_console().print(*map(_details, found), *map(_why_not, broken))


def _entry(sampler: "Sampler") -> dict[str, Any]:
    return {
        "id": sampler.name,
        "kind": "sampler",
        "available": True,
        "reason": None,
        "parameters": sampler.schema(),
    }


def _broken_entry(plugin: "BrokenPlugin") -> dict[str, Any]:
    reason = f"{plugin.distribution}: {plugin.reason}"
    return {"id": plugin.name, "kind": "sampler", "available": False, "reason": reason, "parameters": {}}


def _overview(found: "list[Sampler]", broken: "list[BrokenPlugin]") -> Table:
    table = Table("sampler", "what it does", "parameters", "paper", title="samplers", show_lines=True)
    for sampler in found:
        stated = [f"{name} = {_default(field)}  ({_range(field)})" for name, field in _fields(sampler).items()]
        table.add_row(sampler.name, Text(sampler.summary()), Text("\n".join(stated)), Text(sampler.paper))
    for plugin in broken:
        table.add_row(Text(plugin.name, style="dim"), _why_not(plugin), "", "")
    return table


def _why_not(plugin: "BrokenPlugin") -> Text:
    return Text(f"{plugin.name} of {plugin.distribution} could not be loaded: {plugin.reason}")


def _details(sampler: "Sampler") -> Group:
    table = Table("parameter", "default", "values", "meaning")
    for name, field in _fields(sampler).items():
        table.add_row(Text(name), Text(_default(field)), Text(_range(field)), Text(field.get("description", "")))
    parameters = table if table.rows else Text("It has no parameters.")
    return Group(
        Text(sampler.name, style="bold"), Text(sampler.summary()), Text(sampler.paper, style="dim"), parameters
    )


def _fields(sampler: "Sampler") -> dict[str, dict[str, Any]]:
    """JSON schema of each parameter, without the alternative `null`, which only marks it as optional."""
    fields: dict[str, dict[str, Any]] = {}
    for name, field in sampler.schema().get("properties", {}).items():
        given = [kind for kind in field.get("anyOf", []) if kind.get("type") != "null"]
        fields[name] = {**field, **given[0]} if len(given) == 1 else field
    return fields


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    return "none" if field["default"] is None else json.dumps(field["default"])


def _range(field: dict[str, Any]) -> str:
    """Range of a parameter's values, in words."""
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
