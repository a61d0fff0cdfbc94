import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from server.runtime.metrics import Metrics
from tests.deploy.dashboard import DASHBOARD, expressions, panels

# The metrics' public names, and the labels each has beside model_name.
METRICS = {
    "dllm_requests_running": (),
    "dllm_requests_waiting": (),
    "dllm_requests_total": ("sampler", "finish_reason"),
    "dllm_prompt_tokens_total": (),
    "dllm_generation_tokens_total": ("sampler",),
    "dllm_forward_passes_total": ("sampler",),
    "dllm_model_forwards_total": (),
    "dllm_tokens_per_forward": ("sampler",),
    "dllm_committed_tokens_per_step": ("sampler",),
    "dllm_batch_rows": (),
    "dllm_step_seconds": ("part",),
    "dllm_e2e_request_latency_seconds": (),
    "dllm_time_to_first_token_seconds": (),
    "dllm_time_per_output_token_seconds": (),
    "dllm_request_queue_time_seconds": (),
}
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
SELECTOR = re.compile(r"(dllm_\w+)(?:\{([^}]*)\})?")


def test_the_server_has_these_metrics() -> None:
    families = Metrics("tiny").registry.collect()
    assert {family.name + "_total" * (family.type == "counter") for family in families} >= set(METRICS)


def test_asks_only_for_metrics_and_labels_that_exist() -> None:
    for title, expression in expressions():
        selectors = SELECTOR.findall(expression)
        assert selectors, title
        for name, matchers in selectors:
            labels = {"model_name", "le", *METRICS[HISTOGRAM.sub("", name)]}
            assert set(re.findall(r"(\w+)\s*[=!]~?", matchers)) <= labels, title
            grouped = re.findall(r"\bby \(([^)]*)\)", expression)
            assert {label.strip() for group in grouped for label in group.split(",")} <= labels, title


def test_shows_every_metric() -> None:
    asked = {HISTOGRAM.sub("", name) for _, expression in expressions() for name, _ in SELECTOR.findall(expression)}
    assert asked == set(METRICS)


def test_panels_are_distinct_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_uses_the_chosen_data_source() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in panels():
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_every_expression_is_promql(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
