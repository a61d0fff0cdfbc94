"""The `unmask` command. Exit status: 0 success, 2 usage error (the message names the flag), 1 any other failure."""

import sys

import typer

from server.runtime.logging import configure_logging
from server.runtime.packages import foreign_packages


def create_cli() -> typer.Typer:
    """Build the command line application with all its commands."""
    from server.commands import bench, catalogue, evaluate, generate, serve, train, train_policy

    cli = typer.Typer(
        name="unmask",
        help="An inference server for diffusion language models, with a sampler chosen per request.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    for commands in (serve, generate, catalogue, evaluate, bench, train, train_policy):
        commands.register(cli)
    return cli


def main() -> None:
    """Run the command line."""
    if foreign := foreign_packages():
        names = ", ".join(foreign)
        sys.exit(f"Error: not Unmask's own packages are imported, but {names}: install it in its own environment")
    configure_logging()
    create_cli()()


if __name__ == "__main__":
    main()
