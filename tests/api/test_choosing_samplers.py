"""Three ways to choose a sampler, and what there is to choose from."""

from pathlib import Path
from typing import Any

import pytest

from samplers import list_samplers
from tests.api.serving import NAME, PROMPT, Running, error_of, serving
from tests.installed import SAMPLER, Installed

PARAMS: dict[str, dict[str, Any]] = {"random": {"k": 2}, "topk": {"steps": 4}, "threshold": {"threshold": 0.3}}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("stream", [False, True])
def test_every_way_gives_the_same(server: Running, name: str, stream: bool) -> None:
    ways: list[tuple[str, dict[str, Any]]] = [
        (NAME, {"sampler": name, "sampler_params": PARAMS[name]}),
        (NAME, {"vllm_xargs": {"sampler": name, "sampler_params": PARAMS[name]}}),
        (f"{NAME}:{name}", {"sampler_params": PARAMS[name]}),
        (f"{NAME}:{name}", {"sampler": name, "vllm_xargs": {"sampler_params": PARAMS[name]}}),
    ]
    texts = set()
    with server.client() as client:
        for model, fields in ways:
            answer: Any = client.completions.create(
                model=model, prompt=PROMPT, max_tokens=16, seed=3, stream=stream, extra_body=fields
            )
            chunks = list(answer) if stream else [answer]
            assert chunks[-1].unmask["sampler"] == name
            assert PARAMS[name].items() <= chunks[-1].unmask["sampler_params"].items()
            assert {chunk.model for chunk in chunks} == {model}
            texts.add("".join(chunk.choices[0].text for chunk in chunks))
    assert len(texts) == 1


def test_samplers_differ(server: Running) -> None:
    texts = {
        server.complete(sampler=name, sampler_params=PARAMS[name], seed=3)["choices"][0]["text"] for name in PARAMS
    }
    assert len(texts) == len(PARAMS)


def test_the_servers_default_and_its_parameters(tiny_model: Path) -> None:
    with serving(tiny_model, sampler="topk", sampler_params={"k": 4}) as running:
        assert running.complete()["unmask"]["sampler_params"]["k"] == 4
        assert running.complete(sampler_params={"k": 2})["unmask"]["sampler_params"]["k"] == 2
        assert running.complete(sampler="topk")["unmask"]["sampler_params"]["k"] is None
        assert running.complete(sampler_params={})["unmask"]["sampler_params"]["k"] is None


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"sampler": "nope"}, "sampler", "topk"),
        ({"model": f"{NAME}:nope"}, "model", "topk"),
        ({"vllm_xargs": {"sampler": "nope"}}, "vllm_xargs.sampler", "topk"),
        ({"model": f"{NAME}:topk", "sampler": "random"}, "sampler", "'topk'"),
        ({"sampler": "topk", "vllm_xargs": {"sampler": "random"}}, "vllm_xargs.sampler", "'topk'"),
        (
            {"sampler_params": {"k": 1}, "vllm_xargs": {"sampler_params": {"k": 2}}},
            "vllm_xargs.sampler_params",
            "sampler_params",
        ),
        ({"sampler_params": {"k": 0}}, "sampler_params.k", "greater than or equal to 1"),
        ({"sampler_params": {"k": "2"}}, "sampler_params.k", "'2'"),
        ({"sampler_params": {"k": True}}, "sampler_params.k", "integer"),
        ({"sampler_params": {"k": 10**300}}, "sampler_params.k", "1000000"),
        ({"sampler_params": {"k": 1, "steps": 2}}, "sampler_params", "not both"),
        ({"sampler_params": {"threshold": 0.5}}, "sampler_params.threshold", "topk has no parameter"),
        ({"sampler_params": {"steps": 2}, "block_length": 4}, "sampler_params.steps", "4 blocks"),
        ({"sampler": "threshold", "sampler_params": {"threshold": 1.5}}, "sampler_params.threshold", "1.5"),
        ({"sampler": "threshold", "sampler_params": {"threshold": 0}}, "sampler_params.threshold", "greater than 0"),
        ({"vllm_xargs": {"sampler_params": {"k": 0}}}, "vllm_xargs.sampler_params.k", "1"),
        ({"sampler_params": [1]}, "sampler_params", "object"),
        ({"sampler": ["topk"]}, "sampler", "string"),
    ],
)
def test_wrong_choices_name_the_field(server: Running, fields: dict[str, Any], param: str, said: str) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | fields), 400)
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(server: Running, number: str) -> None:
    body = f'{{"prompt": "a", "sampler": "threshold", "sampler_params": {{"threshold": {number}}}}}'
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["param"] == "sampler_params.threshold"


def test_models_are_listed_with_every_sampler(server: Running) -> None:
    names = [NAME, *(f"{NAME}:{sampler.name}" for sampler in list_samplers() if not sampler.drafts)]
    with server.client() as client:
        models = list(client.models.list())
        assert [model.id for model in models] == names
        for model in models:
            assert client.models.retrieve(model.id) == model
            assert model.to_dict()["max_model_len"] == 256
            assert model.to_dict()["root"] == NAME


@pytest.mark.parametrize("name", ["other", f"{NAME}:nope", "../secret", "a%00b", f"{NAME}/x"])
def test_other_models_are_not_found(server: Running, name: str) -> None:
    error = error_of(server.get(f"/v1/models/{name}"), 404)
    assert error["code"] in ("model_not_found", "not_found")


def test_completions_of_an_unknown_model_are_not_found(server: Running) -> None:
    for path, rest in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        error = error_of(server.post(path, {"model": "gpt-4", **rest}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_samplers_are_listed_with_their_schema(server: Running) -> None:
    listed = server.get("/v1/samplers").json()
    assert listed["object"] == "list"
    cards = [card for card in listed["data"] if card["kind"] == "sampler"]
    assert [card["id"] for card in cards] == [sampler.name for sampler in list_samplers()]
    for card, sampler in zip(cards, list_samplers(), strict=True):
        assert card == server.get(f"/v1/samplers/{card['id']}").json()
        assert card["object"] == "sampler" and card["available"] is (not sampler.drafts and card["id"] != "policy")
        assert card["description"] == sampler.summary()
        assert card["paper"] == sampler.paper
        assert card["parameters"] == sampler.schema()
    assert error_of(server.get("/v1/samplers/nope"), 404)["param"] == "sampler"


def test_a_plugin_that_cannot_be_loaded_harms_no_other(tiny_model: Path, installed: Installed) -> None:
    installed.sampler("import nothing_like_it")
    with serving(tiny_model) as running:
        assert running.complete()["unmask"]["sampler"] == "topk"
        for fields in ({"sampler": "left_to_right"}, {"model": f"{NAME}:left_to_right"}):
            error = error_of(running.post("/v1/completions", {"prompt": PROMPT} | fields), 400)
            assert (error["param"], error["code"]) == (next(iter(fields)), "unknown_sampler")
            assert "'left_to_right' of third_party 1.0 could not be loaded: ModuleNotFoundError" in error["message"]
        cards = running.get("/v1/samplers").json()["data"]
        *ours, broken = [card for card in cards if card["kind"] == "sampler"]
        assert [card["id"] for card in ours] == [sampler.name for sampler in list_samplers()]
        assert broken == running.get("/v1/samplers/left_to_right").json()
        assert broken["available"] is False and "No module named 'nothing_like_it'" in broken["reason"]
        assert not any("left_to_right" in model["id"] for model in running.get("/v1/models").json()["data"])


def test_a_third_partys_sampler_serves(tiny_model: Path, installed: Installed) -> None:
    installed.sampler()
    with serving(tiny_model) as running:
        ours = running.complete(sampler="sequential", sampler_params={"k": 1})["choices"]
        assert running.complete(sampler="left_to_right")["choices"] == ours
        assert running.complete(model=f"{NAME}:left_to_right")["choices"] == ours
        assert running.get("/v1/samplers/left_to_right").json()["available"] is True


def test_what_a_sampler_requires_and_the_server_has_not(tiny_model: Path, installed: Installed) -> None:
    needs = "    requires = {'draft': 'twin'}\n"
    needs += "    def bind(self, resources, params):\n        return resources.find('twin', params.draft)\n"
    installed.sampler(
        SAMPLER.replace("    def select", "    class Params(SamplerParams):\n        draft: str = 'a'\n    def select")
        + needs
    )
    with serving(tiny_model) as running:
        card = running.get("/v1/samplers/left_to_right").json()
        assert (card["available"], card["reason"]) == (False, "this server has no twin")
        error = error_of(running.post("/v1/completions", {"prompt": PROMPT, "sampler": "left_to_right"}), 400)
        assert (error["param"], error["message"]) == ("sampler", "this server has no twin")


def test_a_third_partys_rule_may_be_a_base(tiny_model: Path, installed: Installed) -> None:
    installed.sampler()
    with serving(tiny_model) as running:
        fields = {"sampler": "smc", "sampler_params": {"particles": 2, "base": "left_to_right"}}
        body = running.complete(**fields)
        assert body["choices"] == running.complete(sampler="left_to_right")["choices"], "without a temperature"
        assert body["usage"]["completion_tokens_details"]["forward_passes"] == 32


@pytest.mark.parametrize("method", ["slots(self, params)", "check(self, params, layout)", "select(self, step)"])
def test_a_third_partys_sampler_that_raises_fails_its_request_alone(
    tiny_model: Path, installed: Installed, method: str
) -> None:
    installed.sampler(f"{SAMPLER}    def {method}:\n        raise ZeroDivisionError('by design')\n")
    with serving(tiny_model) as running:
        error_of(running.post("/v1/completions", {"prompt": PROMPT, "sampler": "left_to_right"}), 500)
        assert running.get("/health").status_code == 200
        assert running.complete()["unmask"]["sampler"] == "topk"
