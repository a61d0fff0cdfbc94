"""What one client sends keeps no other from its answers: shares, limits of keys, time."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection

from server.api.owner import Owners, network
from server.engine import KeyLimitError, Quota
from server.engine.quota import FORGET_FROM, Buckets
from server.settings import WrongSettingError, load_settings
from tests.api.serving import PROMPT, Running, error_of, serving, until

LONG = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "sampler": "topk", "sampler_params": {"k": 1}}
SHORT = {"prompt": PROMPT, "max_tokens": 1}


@contextmanager
def connection(running: Running, key: str | None = None) -> Iterator[httpx.Client]:
    """A client on a connection of its own."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=60, trust_env=False) as client:
        yield client


@contextmanager
def asking(running: Running, *bodies: dict[str, Any]) -> Iterator[list[threading.Event]]:
    """Requests under way, each on a connection of its own; what says whether they have ended."""
    ended = [threading.Event() for _ in bodies]

    def ask(body: dict[str, Any], end: threading.Event) -> None:
        with connection(running) as client:
            client.post("/v1/completions", json=body)
        end.set()

    with ThreadPoolExecutor(len(bodies)) as pool:
        with running.gate.closed():
            total = 0
            for body, end in zip(bodies, ended, strict=True):
                total += len(body["prompt"]) * body["n"]
                pool.submit(ask, body, end)
                until(lambda total=total: sum(running.gauges()) == total)
        yield ended
        for generation in running.engine._scheduler.all():
            running.engine.cancel(generation)


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> Iterator[Running]:
    """As many rows as one request has choices, and a queue that two fill."""
    with serving(tiny_model, max_batch=8, max_queue=32) as running:
        yield running


@pytest.mark.parametrize(
    "bodies",
    [
        [{**LONG, "prompt": [PROMPT], "n": 8}],
        [{**LONG, "prompt": [PROMPT], "n": 4, "priority": -(2**63)}] * 6,
        [{**LONG, "prompt": [PROMPT] * 8, "n": 4}, {**LONG, "prompt": [PROMPT] * 4, "n": 4}],
    ],
    ids=["one that takes every row", "six that are most urgent", "two that fill the queue"],
)
def test_a_newcomer_is_answered_whatever_others_sent(small: Running, bodies: list[dict[str, Any]]) -> None:
    with asking(small, *bodies) as ended:
        for _ in range(3):
            with connection(small) as client:
                answer = client.post("/v1/completions", json=SHORT)
            assert answer.status_code == 200, answer.text
        assert not any(end.is_set() for end in ended), "all of theirs take two hundred forwards"
    until(lambda: small.gauges() == (0, 0))


def test_what_was_set_aside_has_the_same_tokens(small: Running) -> None:
    asked = {**LONG, "max_tokens": 24, "n": 8, "seed": 1, "temperature": 0.7}
    alone = small.complete(**asked)["choices"]
    with ThreadPoolExecutor(5) as pool:
        with small.gate.closed():
            answers = [pool.submit(small.complete, **asked) for _ in range(5)]
            until(lambda: sum(small.gauges()) == 40)
        for answer in answers:
            assert [each["text"] for each in answer.result()["choices"]] == [each["text"] for each in alone]


def test_time_is_up_by_default_after_ten_minutes_and_never_with_0(tiny_model: Path, small: Running) -> None:
    assert load_settings({}).request_timeout == 600
    with serving(tiny_model, request_timeout=0) as running:
        for each, timeout in ((small, 600.0), (running, None)):
            with ThreadPoolExecutor(1) as pool:
                with each.gate.closed():
                    answer = pool.submit(each.complete, max_tokens=1)
                    until(lambda each=each: each.engine._scheduler.running)
                    assert each.engine._scheduler.running[0].request.timeout == timeout
                answer.result()


def test_time_in_the_queue_counts(tiny_model: Path) -> None:
    with serving(tiny_model, request_timeout=0.3, max_batch=1) as running, ThreadPoolExecutor(2) as pool:
        with running.gate.closed():
            first = pool.submit(running.post, "/v1/completions", {**LONG, "n": 2})
            until(lambda: running.gauges() == (1, 1))
            threading.Event().wait(0.4)
        message = error_of(first.result(), 504)["message"]
        assert "0.3 seconds (--request-timeout)" in message


@pytest.fixture(scope="module")
def limited(tiny_model: Path) -> Iterator[Running]:
    """Two keys and an admin, each key with limits that are small."""
    limit = "rows=2,queued=3,tokens_per_minute=600"
    with serving(tiny_model, api_key=["a", "b"], admin_key="admin", key_limit=limit, metrics_open=True) as running:
        yield running


def test_a_keys_rows_and_queue_are_bounded(limited: Running) -> None:
    short = {"prompt": "a", "max_tokens": 2}
    with connection(limited, "a") as client, connection(limited, "b") as other, ThreadPoolExecutor(2) as pool:
        with limited.gate.closed():
            first = pool.submit(client.post, "/v1/completions", json={**short, "n": 4})
            until(lambda: limited.gauges() == (2, 2))
            error = error_of(refused := other.post("/v1/completions", json={**short, "n": 6}), 429)
            assert error["code"] == "key_rows" and "rows=2" in error["message"]
            assert refused.headers["x-should-retry"] == "false"
            error = error_of(
                refused := httpx.post(
                    f"{limited.url}/v1/completions", json={**short, "n": 2}, headers={"authorization": "Bearer a"}
                ),
                429,
            )
            assert error["code"] == "key_queued" and "queued=3" in error["message"]
            assert refused.headers["retry-after"] == "1" and "x-should-retry" not in refused.headers
            second = pool.submit(other.post, "/v1/completions", json={**short, "n": 5})
            until(lambda: sum(limited.gauges()) == 9)
        assert first.result().status_code == second.result().status_code == 200
    found = limited.metrics()
    assert found[("dllm_rejected_total", "key_rows")] == found[("dllm_rejected_total", "key_queued")] == 1


def test_what_there_is_no_room_for_is_not_worked_on(limited: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.routes.completions.encode_prompts", lambda *_: pytest.fail("the prompts were read"))
    with connection(limited, "b") as client:
        error_of(client.post("/v1/completions", json={"prompt": ["a"] * 6, "max_tokens": 2}), 429)


def test_a_keys_tokens_a_minute_are_bounded(limited: Running) -> None:
    with connection(limited, "b") as client, connection(limited, "admin") as admin:
        before = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 100, "stream": True})
        assert before.headers["x-ratelimit-limit-tokens"] == "600"
        left = int(before.headers["x-ratelimit-remaining-tokens"])
        assert left < 500 and 9 < float(before.headers["x-ratelimit-reset-tokens"].removesuffix("s")) <= 60
        error = error_of(
            refused := client.post("/v1/completions", json={"prompt": "a", "max_tokens": 200, "n": 3}), 429
        )
        assert error["code"] == "key_tokens" and "tokens_per_minute=600" in error["message"]
        assert refused.headers["x-should-retry"] == "false", "there are never as many"
        error = error_of(
            refused := client.post("/v1/completions", json={"prompt": "a", "max_tokens": 190, "n": 3}), 429
        )
        missing = 571 - left
        assert abs(int(refused.headers["retry-after"]) - missing / 10) <= 2, "when there are as many"
        assert int(refused.headers["x-ratelimit-remaining-tokens"]) >= left
        answer = admin.post("/v1/completions", json={"prompt": "a", "max_tokens": 200, "n": 4})
        assert answer.status_code == 200 and "x-ratelimit-limit-tokens" not in answer.headers
    assert limited.metrics()[("dllm_rejected_total", "key_tokens")] == 2


def test_without_a_limit_nothing_is_said_of_one(small: Running) -> None:
    answer = small.post("/v1/completions", SHORT)
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_more_work_than_a_request_may_be_is_refused(tiny_model: Path) -> None:
    with serving(tiny_model, max_work=50_000) as running:
        error = error_of(running.post("/v1/completions", {**LONG, "n": 4}), 400)
        assert error["param"] == "max_tokens" and "50000 (--max-work)" in error["message"]
        assert running.complete(**{**LONG, "n": 4, "max_tokens": 40})
        assert running.complete(**{**LONG, "n": 4, "sampler_params": {"steps": 4}})


def owner_of(settings: dict[str, Any], host: str = "10.0.0.1", port: int = 1, key: str | None = None) -> Any:
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "client": (host, port), "headers": headers}
    owners = Owners(load_settings(settings))
    return owners, owners.of(HTTPConnection(scope)), scope


def test_an_owner_is_a_key_or_a_connection() -> None:
    owners, first, scope = owner_of({"api_key": ["a", "b"], "admin_key": "c"}, key="a")
    same = owners.of(HTTPConnection({**scope, "client": ("10.0.0.2", 9)}))
    other = owners.of(HTTPConnection({**scope, "headers": [(b"authorization", b"Bearer b")]}))
    admin = owners.of(HTTPConnection({**scope, "headers": [(b"authorization", b"Bearer c")]}))
    assert first == same and first.group != other.group
    assert admin.ahead and not first.ahead and not other.ahead
    assert owner_of({"api_key": ["a"]}, key="a")[1] != owner_of({"api_key": ["a"]}, key="a")[1], "salted"
    owners, first, scope = owner_of({}, key="any")
    other = owners.of(HTTPConnection({**scope, "client": ("10.0.0.1", 2)}))
    assert first.name != other.name and first.group == other.group and not first.ahead
    assert owner_of({"admin_key": "c"}, key="c")[1].ahead
    assert not owner_of({"admin_key": "c"}, key="d")[1].ahead
    assert owners.of(HTTPConnection({"type": "http", "headers": []})).group == ""


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_what_a_client_cannot_choose_of_its_address(host: str, group: str) -> None:
    assert network(host) == group


def test_buckets_fill_up_and_are_forgotten() -> None:
    buckets = Buckets(600)
    buckets.take("a", 500, now=0)
    with pytest.raises(KeyLimitError) as refused:
        buckets.take("a", 150, now=1)
    assert refused.value.wait == pytest.approx(4) and refused.value.budget == buckets.budget("a", 1)
    buckets.take("a", 150, now=5.01)
    buckets.take("b", 600, now=5)
    with pytest.raises(KeyLimitError) as refused:
        buckets.take("c", 601, now=5)
    assert math.isinf(refused.value.wait)
    for i in range(3 * FORGET_FROM):
        buckets.take(f"client {i}", 1, now=10 + i)
    assert len(buckets) <= FORGET_FROM, "those that are full again are as good as none"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rows", "NAME=NUMBER"),
        ("rows=1,rows=2", "once"),
        ("", "NAME=NUMBER"),
        ("rows=0", "rows must be a whole number from 1"),
        ("queued=-1", "queued must be a whole number from 0"),
        ("tokens_per_minute=1e3", "tokens_per_minute must be"),
        ("tokens_per_minute=" + "9" * 500, "tokens_per_minute must be"),
        ("tokens=5", "there is no limit 'tokens'"),
        ({"rows": True}, "rows must be"),
        ({}, "there is no limit in it"),
        (5, "dictionary"),
    ],
)
def test_key_limits_that_make_no_sense(given: Any, message: str) -> None:
    with pytest.raises(WrongSettingError, match=message) as caught:
        load_settings({"key_limit": given})
    assert caught.value.where == "--key-limit"


def test_key_limits_of_flags_variables_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "unmask.toml"
    config.write_text("[key_limit]\nrows = 4\n")
    found = load_settings({}, config).key_limit
    assert found is not None and (found.rows, found.queued) == (4, None)
    monkeypatch.setenv("UNMASK_KEY_LIMIT", " queued = 0 , tokens_per_minute=60000")
    found = load_settings({}, config).key_limit
    assert found is not None and (found.rows, found.queued, found.tokens_per_minute) == (None, 0, 60000)
    assert Quota() == Quota(None, None, None)
