"""Detection of other installed packages that hide ours."""

from importlib.util import find_spec
from pathlib import Path

OURS = ("samplers", "policies", "server")


def foreign_packages() -> list[str]:
    """Our package names that another installed package hides, each with its location.

    The names are common ones: Unmask is an application and should have its own environment.
    """
    home = Path(__file__).resolve().parents[2]
    found = []
    for name in OURS:
        spec = find_spec(name)
        origin = spec.origin if spec else None
        if origin is None or Path(origin).resolve().parents[1] != home:
            found.append(f"{name} ({origin or 'not found'})")
    return found
