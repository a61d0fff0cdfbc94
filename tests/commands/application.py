"""The commands under test, and what they print."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from server.cli import create_cli

app = create_cli()


def unmask(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    # A wide screen, so that no message is broken in two.
    runner = CliRunner(env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    return runner.invoke(app, [str(argument) for argument in arguments], input=stdin)


def right(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command that must succeed."""
    result = unmask(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(status: int, *arguments: object) -> str:
    """Run a command that must end with this status; what it says, on one line."""
    result = unmask(*arguments)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
