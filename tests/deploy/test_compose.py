from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.checkout import ROOT

COMPOSE = ROOT / "deploy/compose.yaml"
SERVICES = ("server", "prometheus", "grafana")


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE.read_text())


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Where in the container -> what of this machine or which volume."""
    return {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}


def test_has_the_three_services_and_only_known_names(compose: Any) -> None:
    assert set(compose) == {"services", "volumes"}
    assert set(compose["services"]) == set(SERVICES)
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        for source in mounts(service).values():
            assert (COMPOSE.parent / source).exists() if source.startswith(".") else source in compose["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(compose: Any, name: str) -> None:
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= set(service)
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


@pytest.mark.parametrize("name", SERVICES)
def test_health_is_checked_and_waited_for(compose: Any, name: str) -> None:
    service = compose["services"][name]
    kind, *arguments = service["healthcheck"]["test"]
    assert kind == "CMD"
    assert not any(" " in argument for argument in arguments), "some engines split arguments at blanks"
    for awaited in service.get("depends_on", {}).values():
        assert awaited["condition"] == "service_healthy"


def test_no_password_is_in_the_file(compose: Any) -> None:
    password = compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
    assert password.startswith("${GRAFANA_PASSWORD:?"), "without one, starting must fail"


def test_a_key_that_is_not_set_is_not_handed_on_as_an_empty_one(compose: Any) -> None:
    assert compose["services"]["server"]["environment"]["UNMASK_API_KEY"] is None


def test_grafana_finds_the_dashboard_and_prometheus(compose: Any) -> None:
    at = mounts(compose["services"]["grafana"])
    provisioning = COMPOSE.parent / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/unmask.yml").read_text())["providers"]

    assert source["url"] == "http://prometheus:9090"
    assert (COMPOSE.parent / at["/etc/grafana/provisioning/datasources"]) == provisioning / "datasources"
    assert (COMPOSE.parent / at["/etc/grafana/provisioning/dashboards"]) == provisioning / "dashboards"
    home = Path(compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (COMPOSE.parent / at[str(home.parent)] / home.name).is_file()
