"""API keys: everything needs one, but for what says it does not."""

import hashlib
import hmac
import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError
from starlette.datastructures import Headers
from starlette.routing import Route

from server.api.middleware.auth import KnownKeys
from server.settings import WrongSettingError, load_settings
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


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
@pytest.mark.parametrize(
    "path",
    [
        *("/nothing", "/health/", "/health/../v1/models", "//health", "/v1/models?x=/health", "/v1/models/"),
        *("//v1/models", "/v1//models", "/health//v1/models", "/health/%2e%2e/v1/models", "/%2fhealth", "/health%00"),
    ],
)
def test_what_is_not_exactly_open_needs_a_key(guarded: Running, path: str, method: str) -> None:
    url = httpx.URL(f"{guarded.url}/").copy_with(raw_path=path.encode())  # as it is
    assert guarded.http.request(method, url).status_code == 401


def test_a_host_header_opens_nothing(guarded: Running) -> None:
    error_of(guarded.get("/v1/models", headers={"host": "x/health?"}), 401)
    error_of(guarded.get("/v1/models", headers={"x-forwarded-prefix": "/health"}), 401)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(guarded: Running, key: str) -> None:
    assert guarded.get("/v1/models", headers=bearer(key)).status_code == 200
    assert guarded.get("/metrics", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", ["Bearer {} ", "Bearer   {}", "Bearer\t{}\t", "bearer {}", "BEARER {}"])
def test_white_space_around_a_clients_key_is_none_of_it(guarded: Running, key: str, form: str) -> None:
    connection = http.client.HTTPConnection(guarded.url.removeprefix("http://"))
    with closing(connection):
        connection.request("GET", "/v1/models", headers={"authorization": form.format(key).encode()})
        assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    ("environment", "keys"),
    [
        ("key1, key2", ["key1", "key2"]),
        ("key1\n", ["key1"]),
        (" key1 ,\tkey2\r\n", ["key1", "key2"]),
        ("key1,", ["key1"]),
        (",\n,key1, ,", ["key1"]),
        ("gr\u00fc\u00df e\u00e0", ["gr\u00fc\u00df e\u00e0"]),  # its last byte is white space in Latin-1
    ],
)
def test_white_space_around_the_servers_keys_is_none_of_them(
    tiny_model: Path, environment: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNMASK_API_KEY", environment)
    monkeypatch.setenv("UNMASK_ADMIN_KEY", " admin\n")
    with serving(tiny_model) as running:
        for key in [*keys, "admin"]:
            assert running.get("/v1/models", headers=bearer(key)).status_code == 200
        error_of(running.get("/v1/models", headers={"authorization": "Bearer"}), 401)
        assert error_of(running.http.delete("/v1/policies/x", headers=bearer("admin")), 404)
        assert error_of(running.http.delete("/v1/policies/x", headers=bearer(keys[0])), 403)


@pytest.mark.parametrize("value", ["", " ", "\n", "\u00a0", "\ufeff", "\u200b"])
@pytest.mark.parametrize("name", ["api_key", "admin_key"])
def test_a_key_that_nobody_could_see_is_refused_wherever_it_stands(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "unmask.toml"
    config.write_text(f"{name} = {json.dumps(value)}\n")
    refused(f"{name} in ", {}, config)
    refused(f"--{name.replace('_', '-')}", {name: [value] if name == "api_key" else value})
    config.write_text(f'{name} = "from the file"\n')
    for variable in (f"UNMASK_{name.upper()}", f"unmask_{name}"):
        with monkeypatch.context() as changed:
            changed.setenv(variable, value)
            refused(f"UNMASK_{name.upper()}", {}, config)


@pytest.mark.parametrize("value", [",", " , \n"])
def test_a_list_of_no_keys_is_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_API_KEY", value)
    refused("UNMASK_API_KEY", {})
    config = tmp_path / "unmask.toml"
    config.write_text("api_key = []\n")
    monkeypatch.delenv("UNMASK_API_KEY")
    refused("api_key in ", {}, config)


def test_a_flag_counts_more_than_an_empty_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_API_KEY", "")
    assert [key.get_secret_value() for key in load_settings({"api_key": ["a"]}).api_key] == ["a"]


def refused(where: str, flags: dict[str, Any], config: Path | None = None) -> None:
    """Loading these settings must fail, for a key that holds none."""
    with pytest.raises(WrongSettingError, match="no key") as caught:
        load_settings(flags, config)
    assert caught.value.where.startswith(where)


def test_keys_of_flags_and_files_are_stripped_too(tmp_path: Path) -> None:
    config = tmp_path / "unmask.toml"
    config.write_text('api_key = [" a\\n", "b,c"]\nadmin_key = " d "\n')
    found = load_settings({}, config)
    assert [key.get_secret_value() for key in found.api_key] == ["a", "b,c"]
    assert found.admin_key is not None and found.admin_key.get_secret_value() == "d"
    assert [key.get_secret_value() for key in load_settings({"api_key": ["e\n", " f"]}).api_key] == ["e", "f"]


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


@pytest.mark.parametrize("key", [*KEYS, "wrong", "w" * 100_000])
def test_every_key_is_compared_by_its_digest_whichever_fits(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time then tells nothing of the keys. Theirs are digested once, at the start."""
    compared: list[tuple[bytes, bytes]] = []
    digested: list[bytes] = []
    known, compare, sha256 = KnownKeys(KEYS), hmac.compare_digest, hashlib.sha256
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    monkeypatch.setattr("hashlib.sha256", lambda data: digested.append(data) or sha256(data))
    assert known.fit(Headers(raw=[(b"authorization", f"Bearer {key}".encode())])) == (key in KEYS)
    assert digested == [key.encode()]
    assert [(len(a), b) for a, b in compared] == [(32, sha256(known.encode()).digest()) for known in KEYS]


def test_no_key_is_not_an_empty_one() -> None:
    """Were there ever an empty key among the server's, whoever sends none would still have none."""
    known = KnownKeys(["a", ""])
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer "}, {"authorization": "Basic a"}):
        assert not known.fit(Headers(headers))


def test_metrics_are_open_by_flag(tiny_model: Path) -> None:
    with serving(tiny_model, api_key=["k"], metrics_open=True) as running:
        assert running.get("/metrics").status_code == 200
        error_of(running.get("/v1/models"), 401)


def claims(document: Any) -> dict[str, bool]:
    """Whether each operation of an OpenAPI document needs a key, by the standard's rules."""
    found = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            found[f"{method} {path}"] = bool(operation.get("security", document.get("security")))
            assert ("401" in operation["responses"]) == found[f"{method} {path}"], path
    return found


@pytest.mark.parametrize("metrics_open", [False, True])
def test_openapi_tells_what_needs_a_key(tiny_model: Path, metrics_open: bool) -> None:
    with serving(tiny_model, api_key=KEYS, metrics_open=metrics_open) as running:
        claimed = claims(running.get("/openapi.json", headers=bearer(KEYS[0])).json())
        for operation, needs_key in claimed.items():
            method, path = operation.split()
            answer = running.http.request(method, path.format(model="x", sampler="x", policy="x"))
            assert (answer.status_code == 401) == needs_key, operation
    assert [path for path, needs_key in claimed.items() if not needs_key] == (
        ["get /health", "get /ready", "get /metrics"] if metrics_open else ["get /health", "get /ready"]
    )


def test_openapi_claims_no_keys_where_there_are_none(server: Running) -> None:
    document = server.get("/openapi.json").json()
    assert not any(claims(document).values())
    assert "securitySchemes" not in document["components"]


def test_no_other_sites_page_may_read_answers(server: Running) -> None:
    origin = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (
        server.http.options("/v1/completions", headers=origin),
        server.get("/v1/models", headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
