"""API keys: everything needs one, but for what says it does not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError
from starlette.routing import Route

from tests.api.serving import Running, error_of, serving

KEYS = ["first-key", "zweiter schlüssel"]
OPEN = {"/health", "/ready"}


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, api_key=KEYS) as running:
        yield running


def bearer(key: str) -> dict[str, bytes]:
    return {"authorization": f"Bearer {key}".encode()}


def test_every_route_but_the_open_ones_needs_a_key(guarded: Running) -> None:
    routes = [route for route in guarded.app.routes if isinstance(route, Route)]
    assert len(routes) >= 13
    for route in routes:
        path = route.path.replace("{model:path}", "tiny").replace("{sampler:path}", "topk")
        for method in route.methods or set():
            answer = guarded.http.request(method, path)
            if path in OPEN:
                assert answer.status_code == 200
            elif method != "HEAD":
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            else:
                assert answer.status_code == 401
    assert {route.path for route in routes} > OPEN


@pytest.mark.parametrize("path", ["/nothing", "/health/", "/health/../v1/models", "//health", "/v1/models?x=/health"])
def test_what_is_not_exactly_open_needs_a_key(guarded: Running, path: str) -> None:
    error_of(guarded.get(path), 401)


def test_a_host_header_opens_nothing(guarded: Running) -> None:
    error_of(guarded.get("/v1/models", headers={"host": "x/health?"}), 401)
    error_of(guarded.get("/v1/models", headers={"x-forwarded-prefix": "/health"}), 401)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(guarded: Running, key: str) -> None:
    assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    assert guarded.get("/metrics", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "value", ["Bearer", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "first-key", "Bearer \xff"]
)
def test_nothing_else_opens(guarded: Running, value: str) -> None:
    error_of(guarded.get("/v1/models", headers={"authorization": value.encode("latin-1")}), 401)


def test_the_client_tells_a_wrong_key(guarded: Running) -> None:
    with guarded.client("wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()
    with guarded.client(KEYS[0]) as client:
        assert client.models.list().data


def test_metrics_are_open_by_flag(tiny_model: Path) -> None:
    with serving(tiny_model, api_key=["k"], metrics_open=True) as running:
        assert running.get("/metrics").status_code == 200
        error_of(running.get("/v1/models"), 401)


def test_openapi_tells_of_the_key(guarded: Running, server: Running) -> None:
    assert guarded.get("/openapi.json", headers=bearer(KEYS[0])).json()["security"] == [{"key": []}]
    assert "security" not in server.get("/openapi.json").json()


def test_no_other_sites_page_may_read_answers(server: Running) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (
        server.http.options("/v1/completions", headers=origin),
        server.get("/v1/models", headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
