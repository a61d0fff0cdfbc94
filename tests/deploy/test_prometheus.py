import shutil
import subprocess
from typing import Any

import pytest
import yaml

from tests.deploy.checkout import ROOT

CONFIG = ROOT / "deploy/prometheus/prometheus.yml"


@pytest.fixture(scope="module")
def config() -> Any:
    return yaml.safe_load(CONFIG.read_text())


def test_scrapes_the_server_where_compose_puts_it(config: Any) -> None:
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert "EXPOSE 8000" in (ROOT / "Dockerfile").read_text()
    assert "server" in yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_configuration() -> None:
    done = subprocess.run(["promtool", "check", "config", CONFIG], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
