"""Errors and log lines repeat little of what was sent; bodies are refused by count before they are read."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from server.api.errors import MAX_MESSAGE, MAX_PARAM, describe
from server.api.routes import samplers
from server.api.schemas import bodies, fields
from server.api.schemas.bodies import MAX_CONTAINERS, MAX_MEMBERS, MAX_VALUES, parse_body, request_error
from server.api.schemas.requests import Body, ChatBody, CompletionBody, DetokenizeBody, PolicyBody, TokenizeBody
from server.engine import RequestError
from tests.api.serving import PROMPT, Running, serving

MARK = "Q"  # in no word of ours
LONG = MARK * 5000
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/v1/policies": {"name": "a"},
}
CLASSES: dict[str, type[Body]] = dict(
    zip(BODIES, (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, PolicyBody), strict=True)
)
TEXTS = st.sampled_from([LONG, f"tiny:{LONG}", f"tiny:policy-{LONG}", f"policy-{LONG}", LONG + "\0" * 50, f"../{LONG}"])
VALUES = st.recursive(
    TEXTS | st.sampled_from([None, 1]),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(TEXTS, inner, min_size=1, max_size=3),
    max_leaves=4,
)
PLACES = [
    ("sampler_params",),
    ("vllm_xargs",),
    ("vllm_xargs", "sampler_params"),
    ("stream_options",),
    ("chat_template_kwargs",),
    ("messages", 0),
    ("messages", 0, "content", 0),
    ("max_new_tokens",),
    ("logit_bias",),
]


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Any:
    """A server that takes policies."""
    folder = str(tmp_path_factory.mktemp("policies"))
    with serving(tiny_model, admin_key="secret", api_key=["secret"], policy_dir=folder) as running:
        yield running


def put(value: Any, place: tuple[str | int, ...], inner: Any) -> Any:
    """A value with something at a place in it."""
    if not place:
        return inner
    name, rest = place[0], place[1:]
    if isinstance(name, int):
        return [put(value[0] if isinstance(value, list) and value else {}, rest, inner)]
    value = value if isinstance(value, dict) else {}
    return value | {name: put(value.get(name), rest, inner)}


@settings(max_examples=120, deadline=None, database=None)
@given(data=st.data())
def test_an_answer_repeats_little_of_what_was_sent(admin: Running, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    body = BODIES[path]
    names = [*CLASSES[path].model_fields, "sampler", "tools", "blocklength"]
    place = data.draw(st.sampled_from([(name,) for name in names] + PLACES))
    inner = data.draw(VALUES)
    if data.draw(st.booleans()):
        inner = {data.draw(TEXTS | st.sampled_from(["policy", "k", "type"])): inner}
    headers = {
        "x-request-id": data.draw(st.sampled_from(["a", LONG])),
        "authorization": "Bearer secret",
        "content-type": data.draw(st.sampled_from(["application/json"] * 6 + [f"text/{LONG}"])),
        "content-encoding": data.draw(st.sampled_from(["identity"] * 6 + [LONG])),
    }
    answer = admin.http.post(path, content=json.dumps(put(body, place, inner)), headers=headers)
    if answer.status_code != 200:
        assert answer.text.count(MARK) + str(answer.headers).count(MARK) <= 200, answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"max_tokens": LONG}),
        ("/v1/completions", {"sampler": LONG}),
        ("/v1/completions", {"sampler_params": {LONG: 1}}),
        ("/v1/completions", {"sampler_params": {"k": {LONG: LONG}}}),
        ("/v1/completions", {"sampler": "policy", "sampler_params": {"policy": LONG}}),
        ("/v1/completions", {"model": f"tiny:policy-{LONG}"}),
        ("/v1/completions", {"vllm_xargs": {LONG: LONG}}),
        ("/v1/completions", {"vllm_xargs": {"sampler_params": {LONG: LONG}}}),
        ("/v1/completions", {"sampler": "topk", "vllm_xargs": {"sampler": LONG}}),
        ("/v1/completions", {"stream_options": {"include_usage": LONG}}),
        ("/v1/chat/completions", {"chat_template_kwargs": {LONG: LONG}}),
        ("/v1/chat/completions", {"messages": [{"role": LONG}]}),
        ("/v1/policies", {"name": LONG[:100], "path": f"../{LONG[:900]}"}),
        ("/v1/policies", {"name": LONG[:90] + " "}),
    ],
)
def test_long_values_and_names_come_back_in_part_only(admin: Running, path: str, fields: dict[str, Any]) -> None:
    headers = {"authorization": "Bearer secret"}
    answer = admin.http.post(path, content=json.dumps(BODIES[path] | fields), headers=headers)
    assert answer.status_code in (400, 404)
    assert answer.text.count(MARK) <= 200, answer.text


@pytest.mark.parametrize("key", ["secret", LONG])
@pytest.mark.parametrize(
    "path", ["/%s", "/v1/models/%s", "/v1/models/tiny:%s", "/v1/samplers/%s", "/v1/policies/%s", "/health?a=%s"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_paths_and_headers_come_back_in_part_only(
    admin: Running, caplog: pytest.LogCaptureFixture, method: str, path: str, key: str
) -> None:
    caplog.set_level("INFO")
    headers = {"authorization": f"Bearer {key}", "x-request-id": LONG, "accept": LONG}
    answer = admin.http.request(method, path % LONG, headers=headers, content=b"{}")
    assert answer.text.count(MARK) + str(answer.headers).count(MARK) <= 200
    told = [record.getMessage() for record in caplog.records if record.name.startswith("server")]
    assert told and all(line.count(MARK) <= 200 for line in told)


def test_a_wrong_field_is_named_in_part() -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(dict[str, int]).validate_python({LONG: "a"})
    error = request_error(caught.value.errors()[0])
    assert str(error).count(MARK) <= 200


def test_whatever_an_error_says_is_short() -> None:
    _, detail = describe(RequestError(LONG, LONG, "code"))
    assert len(detail.message) == MAX_MESSAGE and detail.param is not None and len(detail.param) == MAX_PARAM
    _, detail = describe(RequestError("n", "short", "code"))
    assert (detail.param, detail.message) == ("n", "short")


@pytest.mark.parametrize("name", [LONG, "block_length" * 400])
def test_long_names_are_not_kept(name: str) -> None:
    before = fields._known.cache_info().currsize, fields.misspelt.cache_info().currsize
    parse_body(json.dumps({"prompt": "a", name: 1}).encode(), CompletionBody)
    assert (fields._known.cache_info().currsize, fields.misspelt.cache_info().currsize) == before


MANY = 300_000
TOO_MANY: list[tuple[type[Body], str, dict[str, Any]]] = [
    (CompletionBody, "values", {"prompt": [1] * (MAX_VALUES + 2)}),
    (CompletionBody, "lists", {"prompt": [[1]] * MANY}),
    (CompletionBody, "lists", {"prompt": "a", "sampler_params": {"k": [[]] * MANY}}),
    (CompletionBody, "fields", {"prompt": "a", **{f"x{i}": i for i in range(MAX_MEMBERS + 1)}}),
    (CompletionBody, "fields", {"prompt": "a", "vllm_xargs": {f'"{i}': "\\" for i in range(MAX_MEMBERS + 1)}}),
    (ChatBody, "objects", {"messages": [{"role": "user", "content": "a"}] * (MAX_CONTAINERS + 1)}),
    (ChatBody, "objects", {"messages": [{"role": "user", "content": [{"type": "text", "text": "\\"}] * 20_000}]}),
    (DetokenizeBody, "values", {"tokens": [1] * 1_000_000}),
]


@pytest.mark.parametrize(("cls", "what", "body"), TOO_MANY, ids=range(len(TOO_MANY)))
def test_a_body_of_too_many_things_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, cls: type[Body], what: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(cls, "model_validate_json", lambda _: pytest.fail("it was read"))
    with pytest.raises(RequestError, match=what) as caught:
        parse_body(json.dumps(body).encode(), cls)
    assert caught.value.code == "too_many_values"


@pytest.mark.parametrize("text", ["[{:," * 300_000, '"[{:,' * 300_000, "\\[{:," * 300_000, '\\"[{:,\\' * 300_000])
def test_a_text_may_hold_any_number_of_any_signs(text: str) -> None:
    body = parse_body(json.dumps({"prompt": text}).encode(), CompletionBody)
    assert body.prompt == text


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text('ab"\\[{,:', max_size=8), max_size=40), window=st.integers(1, 9))
def test_texts_are_told_from_what_is_around_them(texts: list[str], window: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "PART", window)
        outside = b"".join(bodies._without_strings(json.dumps(texts, separators=(",", ":")).encode()))
    assert outside == b"[" + b"," * (len(texts) - 1) + b"]"


def test_lists_of_samplers_are_made_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    first = server.get("/v1/samplers").content, server.get("/v1/samplers/topk").content
    monkeypatch.setattr(samplers, "_card", lambda *_: pytest.fail("it was made again"))
    assert (server.get("/v1/samplers").content, server.get("/v1/samplers/topk").content) == first


def test_the_openapi_document_is_made_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    document = server.app.openapi()
    monkeypatch.setattr(server.app, "openapi", lambda: pytest.fail("it was made again"))
    answer = server.get("/openapi.json")
    assert answer.json() == document and answer.headers["content-type"] == "application/json"
