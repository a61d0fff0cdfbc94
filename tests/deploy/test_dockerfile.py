import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.deploy.checkout import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)).splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.partition(" ")[2].strip() for line in INSTRUCTIONS if line.startswith(f"{instruction} ")]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_can_be_chosen_and_nothing_is_downloaded_outside_package_installers() -> None:
    assert {base.split()[0] for base in arguments("FROM")} == {"${BASE}", "dependencies"}
    assert arguments("ARG")[0] == "BASE=python:3.11-slim-bookworm"
    assert not arguments("ADD")


def test_runs_as_an_ordinary_user() -> None:
    assert arguments("USER") == ["10001:10001"]


def test_is_labelled_with_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"VERSION={project['version']}" in arguments("ARG")


def test_starts_the_server_without_a_shell() -> None:
    assert json.loads(arguments("ENTRYPOINT")[0]) == ["unmask"]
    assert json.loads(arguments("CMD")[0]) == ["serve", "--host", "0.0.0.0"]
    assert arguments("EXPOSE") == ["8000"]


def test_checks_its_health_with_our_own_command() -> None:
    command = json.loads(arguments("HEALTHCHECK")[0].partition("CMD ")[2])
    assert command[:2] == ["unmask", "health"]
    assert not any(" " in argument for argument in command), "some engines split arguments at blanks"


def test_stays_within_what_older_builders_understand() -> None:
    for refused in ("<<", "--link", "--start-interval"):
        assert refused not in DOCKERFILE
