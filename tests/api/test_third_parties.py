"""What a third party's sampler can do to the API: fail its own requests."""

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from samplers import get_sampler
from server.api.model_names import ModelNames
from server.api.sampler_choice import SamplerChoice, SamplerRequest, check_default_sampler, runs_only_ours
from server.api.text_threads import SHORT_THREADS
from server.engine import RequestError
from server.settings import load_settings
from tests.api.serving import PROMPT, Running, error_of, serving, until
from tests.installed import SAMPLER, Installed, forget, look_at

PARAMS = """
    class Params(SamplerParams):
        k: int = 1
"""
VALIDATES = """
        @pydantic.field_validator("k")
        @classmethod
        def look(cls, k):
            {}
"""
REFUSES = """
    def check(self, params, layout):
        raise ParameterError("k" * 10_000, "z" * 10_000_000)
"""
DUMPS = """
        def model_dump(self, **_):
            {}
"""
FAULTS = {
    "raises": PARAMS + VALIDATES.format("raise RuntimeError('by design')"),
    "exits": PARAMS + VALIDATES.format("raise SystemExit(3)"),
    "interrupts": PARAMS + VALIDATES.format("raise KeyboardInterrupt"),
    "speechless": PARAMS + VALIDATES.format("raise Speechless"),
    "dumps": PARAMS + DUMPS.format("raise SystemExit(3)"),
    "dumps_a_list": PARAMS + DUMPS.format("return [1]"),
    "dumps_an_object": PARAMS + DUMPS.format("return {'k': object()}"),
    "dumps_much": PARAMS + DUMPS.format("return {'k': 'x' * 50_000_000}"),
    "starts": "    def slots(self, params):\n        raise SystemExit(3)\n",
    "waits": "    def select(self, step):\n        return Selection(step.candidate & False, waits=True)\n",
    "refuses": PARAMS + REFUSES,
    "long": PARAMS + VALIDATES.format("raise ValueError('y' * 10_000_000)"),
    "moody": "",
    "says_much": PARAMS + DUMPS.format("return {'k': 'x' * 20_000}"),
    "blocks": PARAMS + VALIDATES.format("INSIDE.append(k); PAST.append(GO.wait(10)); return k"),
    "renamed": PARAMS,
}
"""By name of a sampler: what is wrong with it."""
HEAD = """
import threading
import pydantic
from samplers import ParameterError, Sampler, SamplerParams, Selection

INSIDE, PAST, GO = [], [], threading.Event()

class Speechless(Exception):
    def __str__(self):
        raise SystemExit("no message")
"""


@pytest.fixture(scope="module")
def hostile(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one sampler for each fault."""
    folder = tmp_path_factory.mktemp("third-parties")
    with pytest.MonkeyPatch.context() as patching:
        patching.syspath_prepend(str(folder))
        installed = Installed(folder)
        look_at(installed.found, patching)
        for name, fault in FAULTS.items():
            source = HEAD + SAMPLER.replace("left_to_right", name) + fault
            installed.add(f"party_{name}", source, "unmask.samplers", **{name: "LeftToRight"})
        with serving(tiny_model) as running:
            yield running
    forget()


def ask(server: Running, name: str) -> Any:
    return server.post("/v1/completions", {"prompt": PROMPT, "sampler": name, "sampler_params": {"k": 2}})


@pytest.mark.parametrize("name", list(FAULTS)[:8])
def test_parameters_that_fail_fail_their_request(hostile: Running, name: str) -> None:
    error = error_of(ask(hostile, name), 500)
    assert error["code"] == "generation_failed" and error["message"].startswith(f"sampler {name} failed: ")
    assert len(error["message"]) <= 500
    assert hostile.complete()["unmask"]["sampler"] == "topk"


@pytest.mark.parametrize("name", ["starts", "waits"])
def test_one_that_fails_is_named(hostile: Running, name: str) -> None:
    error = error_of(hostile.post("/v1/completions", {"prompt": PROMPT, "sampler": name}), 500)
    assert error["code"] == "generation_failed" and error["message"].startswith(f"sampler {name} failed: ")
    assert hostile.get("/health").status_code == 200


@pytest.mark.parametrize("name", ["refuses", "long"])
def test_a_refusal_is_short(hostile: Running, name: str) -> None:
    error = error_of(ask(hostile, name), 400)
    assert error["param"].startswith("sampler_params.k")
    assert len(error["param"]) < 120 and len(error["message"]) <= 700


def test_one_that_fails_later_does_not_take_the_list_with_it(hostile: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = hostile.get("/v1/samplers").json()["data"]
    sampler = get_sampler("moody")

    def fails(*_: object) -> None:
        raise SystemExit("not today")

    for name in ("incompatibility", "summary", "schema"):
        monkeypatch.setattr(sampler, name, fails, raising=False)
    again = hostile.get("/v1/samplers").json()["data"]
    assert [card for card in again if card["id"] != "moody"] == [card for card in listed if card["id"] != "moody"]
    assert hostile.get("/v1/models").status_code == 200
    assert error_of(hostile.post("/v1/completions", {"prompt": PROMPT, "sampler": "moody"}), 500)


def test_what_it_says_of_its_parameters_is_short(hostile: Running) -> None:
    error = error_of(ask(hostile, "says_much"), 500)
    assert error["message"] == "sampler says_much failed: its parameters are more than 16384 bytes"


def test_it_is_known_by_the_name_it_was_loaded_by(hostile: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(_: object) -> str:
        raise SystemExit("nameless")

    samplers, models = (hostile.get(f"/v1/{path}").json() for path in ("samplers", "models"))
    for name in ("name", "Params"):
        monkeypatch.setattr(type(get_sampler("renamed")), name, property(changed))
    assert hostile.get("/v1/samplers").json() == samplers
    assert hostile.get("/v1/models").json()["data"] == models["data"]
    misspelt = error_of(hostile.post("/v1/completions", {"prompt": PROMPT, "threshhold": 0.5}), 400)
    assert "sampler_params.threshold" in misspelt["message"]
    body = {"prompt": PROMPT, "sampler": "renamed", "max_tokens": 1}
    said = error_of(hostile.post("/v1/completions", body), 500)["message"]
    assert said.startswith("sampler (a text that cannot be shown) failed: SystemExit")
    assert hostile.complete(max_tokens=1)["unmask"]["sampler"] == "topk"


def test_its_own_checks_hold_up_nobody_else(hostile: Running) -> None:
    """Neither the event loop nor the threads in which other requests are read."""
    module = sys.modules["party_blocks"]
    with ThreadPoolExecutor(SHORT_THREADS) as away:
        began = [away.submit(ask, hostile, "blocks") for _ in range(SHORT_THREADS)]
        try:
            until(lambda: len(module.INSIDE) == SHORT_THREADS)
            assert hostile.complete(max_tokens=1)["unmask"]["sampler"] == "topk"
            assert hostile.get("/health").status_code == 200
            assert module.PAST == []
        finally:
            module.GO.set()
        assert all(each.result().status_code == 200 for each in began)


def test_no_list_asks_it_again(hostile: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(get_sampler("moody"), "incompatibility", asked.append, raising=False)
    for path in ("samplers", "models", "models/tiny", "models/tiny:moody"):
        assert hostile.get(f"/v1/{path}").status_code == 200
    assert asked == []


@pytest.mark.usefixtures("hostile")
def test_one_that_another_is_built_on_is_not_ours_either() -> None:
    topk, smc = get_sampler("topk"), get_sampler("smc")
    default = SamplerChoice(topk, topk.Params(), "topk")
    built = SamplerChoice(smc, smc.Params.model_validate({"base": "blocks"}), "smc")
    assert runs_only_ours(SamplerRequest("smc", "sampler_params", {"base": "topk"}), default)
    assert not runs_only_ours(SamplerRequest("smc", "sampler_params", {"base": "blocks"}), default)
    assert not runs_only_ours(SamplerRequest("smc", "sampler_params", None), built)
    assert not runs_only_ours(SamplerRequest("blocks", "sampler_params", None), default)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, RuntimeError])
def test_what_exits_in_a_handler_ends_its_request_only(
    hostile: Running, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def leaves(*_: object) -> None:
        raise kind("by design")

    with monkeypatch.context() as patching:
        patching.setattr(ModelNames, "names", leaves)
        answer = hostile.get("/v1/models")
    assert error_of(answer, 500)["code"] == "internal_error" and answer.headers["x-request-id"]
    assert hostile.get("/v1/models").status_code == 200


def test_the_server_looks_after_its_engine(hostile: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(hostile.engine, "look_after", looked.set)
    assert looked.wait(30)


@pytest.mark.usefixtures("hostile")
def test_a_default_whose_parameters_fail_is_a_wrong_setting() -> None:
    with pytest.raises(RequestError, match="sampler raises failed: RuntimeError: by design") as caught:
        check_default_sampler(load_settings({"sampler": "raises", "sampler_params": {"k": 2}}))
    assert caught.value.field == "sampler_params"
