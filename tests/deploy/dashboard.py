"""The Grafana dashboard, read."""

import json
from typing import Any

from tests.deploy.checkout import ROOT

DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/unmask.json").read_text())


def panels() -> list[dict[str, Any]]:
    """Every panel but the headings."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[tuple[str, str]]:
    """(panel title, PromQL) with Grafana's variables filled in."""
    filled = {"$__rate_interval": "1m", "$model": ".*", "$sampler": ".*"}
    found = []
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for variable, value in filled.items():
                expression = expression.replace(variable, value)
            found.append((panel["title"], expression))
    return found
