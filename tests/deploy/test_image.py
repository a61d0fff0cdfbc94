"""The container image, built and run for real; compose with a real Prometheus. `make test-image` runs this."""

import json
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import yaml

from tests.deploy import engine
from tests.deploy.checkout import ANSWER, ROOT, complete, free_port, get, readme_request, wait_until_ready
from tests.deploy.dashboard import expressions

pytestmark = [pytest.mark.image, pytest.mark.timeout(2400)]

CONFINED = ["--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp", "--cap-drop", "all"]
CONFINED += ["--security-opt", "no-new-privileges", "--memory", "2g", "--pids-limit", "512"]
COMPOSE = ROOT / "deploy/compose.yaml"
PROJECT = "unmask-test"


@pytest.fixture(scope="module")
def image() -> str:
    engine.prepare()
    engine.build(engine.IMAGE, ROOT / "Dockerfile", ROOT, *engine.package_index_mounts())
    return engine.IMAGE


@contextmanager
def running(image: str, name: str) -> Iterator[str]:
    """The image with its own command, on a bridge; yields the server's address on this machine."""
    port = free_port()
    engine.podman("rm", "--force", "--ignore", name)
    engine.podman("run", "--detach", "--name", name, "--publish", f"127.0.0.1:{port}:8000", *CONFINED, image)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", seconds=120)
        yield f"http://127.0.0.1:{port}"
    except BaseException:
        print(engine.podman("logs", name, check=False))  # noqa: T201 - pytest shows it with the failure
        raise
    finally:
        engine.podman("rm", "--force", "--time", "1", name)


def unmask(image: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return engine.podman("run", "--rm", "--network", "none", *CONFINED, image, *arguments, check=False)


def test_configuration_and_labels(image: str) -> None:
    (inspected,) = json.loads(engine.podman("image", "inspect", image).stdout)
    config = inspected["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["unmask"]
    assert config["Cmd"] == ["serve", "--host", "0.0.0.0"]
    assert "8000/tcp" in config["ExposedPorts"]
    assert inspected["Healthcheck"]["Test"] == ["CMD", "unmask", "health"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_holds_the_packages_but_no_tests_or_build_leftovers(image: str) -> None:
    look = "import importlib.util as u, os, json; print(json.dumps([bool(u.find_spec('server')), "
    look += "bool(u.find_spec('tests')), os.path.exists('/src'), os.path.getsize('/etc/pip.conf') "
    look += "if os.path.exists('/etc/pip.conf') else 0, os.getuid(), os.access('/opt/unmask', os.W_OK)]))"
    done = engine.podman("run", "--rm", *CONFINED, "--entrypoint", "python", image, "-c", look)
    assert json.loads(done.stdout) == [True, False, False, 0, 10001, False]


def test_answers_while_confined_and_stops_cleanly(image: str) -> None:
    name = "unmask-test-server"
    with running(image, name) as url:
        assert complete(url, readme_request()).strip().endswith(ANSWER)
        engine.podman("healthcheck", "run", name)
        engine.podman("stop", "--time", "30", name)
        assert engine.podman("inspect", name, "--format", "{{.State.ExitCode}}").stdout.strip() == "0"


def test_health_fails_where_no_server_is(image: str) -> None:
    done = unmask(image, "health")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_flag_is_wrong_use(image: str) -> None:
    done = unmask(image, "serve", "--no-such-flag")
    assert done.returncode == 2
    assert "--no-such-flag" in done.stderr


PROMETHEUS_FILE = """
FROM {base}
COPY --chmod=755 prometheus wget /bin/
RUN install --directory --owner=nobody --group=nogroup /prometheus
USER nobody
ENTRYPOINT ["/bin/prometheus"]
"""
# Enough of wget for the health check: the stand-in has Python, the real image has busybox.
WGET = "#!/usr/bin/env python3\nimport sys, urllib.request\nurllib.request.urlopen(sys.argv[-1], timeout=3)\n"


@pytest.fixture(scope="module")
def prometheus_image(image: str) -> str:
    """Debian's Prometheus under the name that compose.yaml asks for."""
    name: str = yaml.safe_load(COMPOSE.read_text())["services"]["prometheus"]["image"]
    name = name.removeprefix("${PROMETHEUS_IMAGE:-").removesuffix("}")
    context = engine.HOME / "prometheus"
    context.mkdir(exist_ok=True)
    program = shutil.which("prometheus")
    assert program
    shutil.copy(program, context / "prometheus")
    (context / "wget").write_text(WGET)
    (context / "Dockerfile").write_text(PROMETHEUS_FILE.format(base=engine.BASE))
    engine.build(name, context / "Dockerfile", context)
    return name


@pytest.fixture
def compose_environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The published ports. Compose talks to podman's socket; nothing else is running health checks' timers here."""
    ports = {"UNMASK_PORT": free_port(), "PROMETHEUS_PORT": free_port()}
    for name, port in ports.items():
        monkeypatch.setenv(name, str(port))
    monkeypatch.setenv("UNMASK_IMAGE", engine.IMAGE)
    monkeypatch.setenv("GRAFANA_PASSWORD", "only-for-this-test")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{engine.HOME}/podman.sock")
    return ports


def compose(*arguments: str, timeout: float = 180) -> str:
    return engine.run("docker-compose", "-p", PROJECT, "-f", COMPOSE, *arguments, timeout=timeout).stdout


@contextmanager
def podman_service() -> Iterator[None]:
    """Podman's socket, and a loop in place of the timers that systemd would run health checks by."""
    socket = engine.HOME / "podman.sock"
    command = ["podman", "system", "service", "--time=0", f"unix://{socket}"]
    service = subprocess.Popen(command, env=engine.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stop = threading.Event()

    def check_health() -> None:
        while not stop.wait(1):
            for name in ("server", "prometheus"):
                engine.podman("healthcheck", "run", f"{PROJECT}_{name}_1", check=False)

    checks = threading.Thread(target=check_health)
    checks.start()
    try:
        while not socket.exists():
            assert service.poll() is None
            time.sleep(0.1)
        yield
    finally:
        stop.set()
        checks.join()
        service.terminate()
        service.wait(timeout=30)


def test_compose_configuration_is_valid(image: str, compose_environment: dict[str, int]) -> None:
    resolved = yaml.safe_load(compose("config"))
    assert set(resolved["services"]) == {"server", "prometheus", "grafana"}


def test_compose_refuses_to_start_without_a_grafana_password(
    image: str, compose_environment: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAFANA_PASSWORD")
    with pytest.raises(RuntimeError, match="set GRAFANA_PASSWORD"):
        compose("config")


def test_compose_brings_up_a_server_that_prometheus_scrapes(
    prometheus_image: str, compose_environment: dict[str, int]
) -> None:
    server = f"http://127.0.0.1:{compose_environment['UNMASK_PORT']}"
    prometheus = f"http://127.0.0.1:{compose_environment['PROMETHEUS_PORT']}"

    def query(expression: str) -> list[Any]:
        answer = get(f"{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': expression})}")
        assert answer["status"] == "success", answer
        result: list[Any] = answer["data"]["result"]
        return result

    def settled(expressions: list[tuple[str, str]], seconds: float) -> list[str]:
        """The panels that show nothing, once waiting is over."""
        deadline = time.monotonic() + seconds
        while True:
            empty = [title for title, expression in expressions if not query(expression)]
            if not empty or time.monotonic() > deadline:
                return empty
            complete(server, readme_request())
            time.sleep(2)

    with podman_service():
        try:
            compose("up", "--detach", "--no-build", "server", "prometheus")
            wait_until_ready(server, seconds=60)
            assert not settled([("up", "up{job='unmask'} == 1")], seconds=30)
            assert not settled(expressions(), seconds=60)
        finally:
            compose("down", "--volumes", "--timeout", "20")
