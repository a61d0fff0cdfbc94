"""Trained policies over HTTP: chosen per request, loaded and removed while others run."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.serving.checkpoint import WEIGHTS, save_policy
from policies.serving.store import Stored
from policies.serving.watched_folder import PolicyFolder
from server.api.routes.policies import Entries
from server.api.schemas.responses import PIECE, WholeJson
from tests.api.serving import NAME, PROMPT, Running, error_of, serving, until
from tests.policies.tiny import card, network

ADMIN = {"Authorization": "Bearer admin"}


def write(folder: Path, vocab_size: int, seed: int = 0, **config: Any) -> Path:
    trained = {"vocab_size": vocab_size, "gen_lengths": (16,)}
    save_policy(network(seed, **config), card(config=config, trained_on=trained), folder)
    return folder


@pytest.fixture(scope="module")
def vocab_size(server: Running) -> int:
    return server.engine.info.vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vocab_size: int) -> Path:
    root = tmp_path_factory.mktemp("policies")
    write(root / "eager", vocab_size, output_bias=6.0)
    write(root / "careful", vocab_size, 1, output_bias=-6.0)
    write(root / "told", vocab_size, 2, takes_speed=True, temperature=0.0)
    return root


@pytest.fixture
def policed(tiny_model: Path, folder: Path) -> Iterator[Running]:
    """A server with three policies, and a folder to load more from."""
    with serving(tiny_model, policy_dir=str(folder), admin_key="admin") as running:
        for name in ("eager", "careful", "told"):
            running.policies.load(name, folder / name)
        yield running


def choose(name: str, **params: Any) -> dict[str, Any]:
    return {"sampler": "policy", "sampler_params": {"policy": name, **params}, "block_length": None, "seed": 1}


def passes(body: dict[str, Any]) -> int:
    forwards: int = body["usage"]["completion_tokens_details"]["forward_passes"]
    return forwards


def test_a_request_chooses_its_policy_in_three_ways(policed: Running) -> None:
    by_field = policed.complete(**choose("eager"))
    by_model = policed.complete(model=f"{NAME}:policy-eager", block_length=None, seed=1)
    by_xargs = policed.complete(vllm_xargs={k: v for k, v in choose("eager").items() if k.startswith("s")}, seed=1)
    assert by_field["choices"][0]["text"] == by_model["choices"][0]["text"]
    for body in (by_field, by_model, by_xargs):
        assert body["unmask"]["sampler"] == "policy"
        assert body["unmask"]["sampler_params"]["policy"] == "eager"
    assert passes(by_field) < passes(policed.complete(**choose("careful")))


def test_a_policy_can_be_the_servers_default(tiny_model: Path, folder: Path) -> None:
    """It is looked up in each request, since policies come and go; the only one needs no name."""
    with serving(tiny_model, sampler="policy") as running:
        body = {"prompt": PROMPT, "max_tokens": 16}
        assert error_of(running.post("/v1/completions", body), 400)["param"] == "sampler_params.policy"
        running.policies.load("eager", folder / "eager")
        assert running.complete(block_length=None)["unmask"]["sampler_params"]["policy"] == "eager"
        running.policies.load("careful", folder / "careful")
        error = error_of(running.post("/v1/completions", body), 400)
        assert error["code"] == "unknown_policy" and "loaded are careful, eager" in error["message"]
        chosen = running.complete(sampler_params={"policy": "careful"}, max_tokens=24)["unmask"]
        assert chosen["sampler_params"]["policy"] == "careful" and "runs on 24" in chosen["warnings"][0]


def test_the_knobs_of_a_request_reach_the_policy(policed: Running) -> None:
    slow, fast = (passes(policed.complete(**choose("told", speed=speed))) for speed in (0.0, 1.0))
    assert fast < slow
    assert passes(policed.complete(**choose("eager", floor=1.0))) == 16
    assert passes(policed.complete(**choose("careful", cut=0.000001))) == 1


def test_the_openai_client_streams_by_a_policy(policed: Running) -> None:
    with policed.client() as client:
        fields = {"model": f"{NAME}:policy-told", "prompt": PROMPT, "max_tokens": 16, "seed": 1}
        whole = client.completions.create(**fields)
        chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"sampler": "policy"}, "sampler_params.policy", "careful, eager, told"),
        (choose("nope"), "sampler_params.policy", "no policy 'nope' is loaded"),
        ({"model": f"{NAME}:policy-nope"}, "model", "no policy 'nope' is loaded"),
        (choose("eager") | {"model": f"{NAME}:policy-told"}, "sampler_params.policy", "send one of them"),
        (choose("eager", speed=0.5), "sampler_params.speed", "not trained to be told a speed"),
        (choose("told", speed=1.5), "sampler_params.speed", "less than or equal to 1"),
        (choose("eager", beta=0), "sampler_params.beta", "greater than 0"),
        (choose("eager", cut=0.5, temperature=1.0), "sampler_params.cut", "not both"),
        (choose("eager", k=2), "sampler_params.k", "no parameter 'k'"),
        (choose("../eager"), "sampler_params.policy", "no policy '../eager' is loaded"),
        ({"sampler": "policy", "sampler_params": {"policy": 3}}, "sampler_params.policy", "string"),
    ],
)
def test_wrong_choices_name_the_field(policed: Running, fields: dict[str, Any], param: str, said: str) -> None:
    error = error_of(policed.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | fields), 400)
    assert error["param"] == param and said in error["message"]


def test_what_differs_from_the_training_is_a_warning(policed: Running) -> None:
    assert "warnings" not in policed.complete(**choose("eager"))["unmask"]
    longer = policed.complete(**choose("eager"), max_tokens=24)["unmask"]["warnings"]
    blocks = policed.complete(**choose("eager") | {"block_length": 4})["unmask"]["warnings"]
    assert len(longer) == len(blocks) == 1
    assert "runs on 24" in longer[0] and "blocks of 4" in blocks[0]


def test_policies_and_models_are_listed(policed: Running) -> None:
    listed = policed.get("/v1/policies").json()
    assert listed["object"] == "list"
    assert [entry["id"] for entry in listed["data"]] == ["careful", "eager", "told"]
    for entry in listed["data"]:
        assert entry == policed.get(f"/v1/policies/{entry['id']}").json()
        assert entry["parameters"] > 1000 and entry["trained_on"]["gen_lengths"] == [16]
    assert [entry["takes_speed"] for entry in listed["data"]] == [False, False, True]
    with policed.client() as client:
        names = [model.id for model in client.models.list()]
    assert names[-3:] == [f"{NAME}:policy-{name}" for name in ("careful", "eager", "told")]
    assert error_of(policed.get("/v1/policies/nope"), 404)["param"] == "policy"
    assert policed.get("/v1/samplers/policy").json()["available"] is True


def test_what_is_said_of_policies_is_made_once(policed: Running, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = Entries._make

    def counted(self: Entries, stored: Stored) -> bytes:
        made.append(stored.name)
        return make(self, stored)

    monkeypatch.setattr(Entries, "_make", counted)
    for _ in range(3):
        listed = policed.get("/v1/policies").json()["data"]
        assert listed == [policed.get(f"/v1/policies/{name}").json() for name in ("careful", "eager", "told")]
    assert sorted(made) == ["careful", "eager", "told"]
    policed.policies.load("eager", folder / "careful")
    policed.policies.remove("told")
    listed = policed.get("/v1/policies").json()["data"]
    assert [each["id"] for each in listed] == ["careful", "eager"] and made[3:] == ["eager"]


def test_a_long_answer_goes_out_in_pieces() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    body = bytes(range(256)) * 1000
    anyio.run(WholeJson(body), {"type": "http"}, None, send)
    pieces = [message["body"] for message in sent[1:]]
    assert b"".join(pieces) == body and max(map(len, pieces)) == PIECE
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * (len(pieces) - 1) + [False]
    assert (b"content-length", b"256000") in sent[0]["headers"]


def test_without_policies_the_sampler_is_unavailable(server: Running) -> None:
    found = server.get("/v1/samplers/policy").json()
    assert (found["available"], found["reason"]) == (False, "no policy is loaded")
    assert server.get("/v1/policies").json() == {"object": "list", "data": []}
    error = error_of(server.post("/v1/completions", {"prompt": "a", "sampler": "policy"}), 400)
    assert error["param"] == "sampler_params.policy"


def test_policies_come_and_go_over_http(policed: Running, folder: Path, vocab_size: int) -> None:
    write(folder / "late", vocab_size, 5, output_bias=6.0)
    loaded = policed.post("/v1/policies", {"name": "late"}, headers=ADMIN)
    assert loaded.status_code == 200 and loaded.json()["id"] == "late"
    assert policed.post("/v1/policies", {"name": "other", "path": "late"}, headers=ADMIN).status_code == 200
    assert policed.complete(**choose("late"))["choices"] == policed.complete(**choose("other"))["choices"]
    removed = policed.http.delete("/v1/policies/late", headers=ADMIN)
    assert removed.json() == {"id": "late", "object": "policy.deleted", "deleted": True}
    error_of(policed.http.delete("/v1/policies/late", headers=ADMIN), 404)
    error_of(policed.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8} | choose("late")), 400)


def test_only_the_admin_key_changes_policies(policed: Running, server: Running, folder: Path) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic admin"}):
        assert error_of(policed.post("/v1/policies", {"name": "eager"}, headers=headers), 403)["code"] == "forbidden"
        error_of(policed.http.delete("/v1/policies/eager", headers=headers), 403)
    error_of(server.post("/v1/policies", {"name": "eager"}, headers=ADMIN), 403)
    assert policed.get("/v1/policies/eager").status_code == 200


def test_the_admin_key_is_an_api_key_too(tiny_model: Path, folder: Path) -> None:
    with serving(tiny_model, policy_dir=str(folder), admin_key="admin", api_key=["user"]) as running:
        error_of(running.get("/v1/policies"), 401)
        user = {"Authorization": "Bearer user"}
        assert running.get("/v1/policies", headers=user).status_code == 200
        error_of(running.post("/v1/policies", {"name": "eager"}, headers=user), 403)
        assert running.post("/v1/policies", {"name": "eager"}, headers=ADMIN).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": 3}, "name"),
        ({"name": "a/b", "path": "eager"}, "name"),
        ({"name": "a", "path": "nothing"}, "path"),
        ({"name": "a", "path": "../eager"}, "path"),
        ({"name": "a", "path": "/etc"}, "path"),
        ({"name": "a", "path": "."}, "path"),
        ({"name": "a", "path": "eager/.."}, "path"),
        ({"name": "a", "path": "a\0b"}, "path"),
        ({"name": "a", "path": "link"}, "path"),
        ({"name": "a", "path": "x" * 1001}, "path"),
        ({"name": "a", "path": "x" * 999}, "path"),
        ({"name": "a", "path": "broken"}, "path"),
        ({"name": "a", "path": "nan"}, "path"),
        ({"name": "a", "path": "others"}, "path"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    policed: Running, folder: Path, vocab_size: int, body: dict[str, Any], param: str
) -> None:
    if not (folder / "link").exists():
        (folder / "link").symlink_to("/etc")
        shutil.copytree(folder / "eager", folder / "broken")
        (folder / "broken" / WEIGHTS).write_bytes(b"\x80\x04")
        shutil.copytree(folder / "eager", folder / "nan")
        tensors = load_file(folder / "nan" / WEIGHTS)
        save_file(tensors | {"head.bias": torch.tensor([torch.nan])}, folder / "nan" / WEIGHTS)
        write(folder / "others", vocab_size + 1, tokens=vocab_size + 1)
    before = policed.get("/v1/policies").json()
    error = error_of(policed.post("/v1/policies", body, headers=ADMIN), 400)
    assert error["param"] == param
    assert policed.get("/v1/policies").json() == before
    assert passes(policed.complete(**choose("eager"))) >= 1


def test_replacing_a_policy_under_load_drops_no_request(policed: Running, folder: Path) -> None:
    """Each answer is one of the two policies', whole; none fails."""
    answers: list[str] = []
    policed.policies.load("changing", folder / "careful")
    slow = policed.complete(**choose("changing"))["choices"][0]["text"]
    policed.policies.load("changing", folder / "eager")
    fast = policed.complete(**choose("changing"))["choices"][0]["text"]

    def ask() -> None:
        for _ in range(5):
            answers.append(policed.complete(**choose("changing"))["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(40):
        path = "careful" if i % 2 else "eager"
        assert policed.post("/v1/policies", {"name": "changing", "path": path}, headers=ADMIN).status_code == 200
    for thread in threads:
        thread.join()
    assert len(answers) == 20 and set(answers) <= {slow, fast}


def test_a_generation_outlives_its_policy(policed: Running) -> None:
    done: list[Any] = []
    before = policed.gate.forwards
    with policed.gate.closed():
        thread = threading.Thread(target=lambda: done.append(policed.complete(**choose("careful"))))
        thread.start()
        until(lambda: policed.gauges()[0] == 1)
        assert policed.http.delete("/v1/policies/careful", headers=ADMIN).status_code == 200
    thread.join()
    assert done[0]["usage"]["completion_tokens"] >= 1 and policed.gate.forwards > before


def test_different_policies_share_the_models_forwards(policed: Running) -> None:
    """One forward of the model a turn for all of them."""
    before = policed.metrics()
    threads = [
        threading.Thread(target=policed.complete, kwargs=choose(name) | {"ignore_eos": True})
        for name in ("eager", "careful", "told") * 2
    ]
    with policed.gate.closed():
        for thread in threads:
            thread.start()
        until(lambda: sum(policed.gauges()) == 6)
    for thread in threads:
        thread.join()
    after = policed.metrics()
    batched = after[("dllm_model_forwards_total",)] - before[("dllm_model_forwards_total",)]
    own = after[("dllm_forward_passes_total", "policy")] - before.get(("dllm_forward_passes_total", "policy"), 0.0)
    assert batched < own


def test_a_folder_that_is_not_there_yet_is_waited_for(
    policed: Running, tmp_path: Path, vocab_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    watched = PolicyFolder(policed.policies, tmp_path / "later")
    for _ in range(3):
        watched.look()
    assert caplog.text.count("cannot read the folder of policies") == 1
    write(tmp_path / "later" / "fresh", vocab_size)
    watched.look()
    assert policed.policies.get("fresh").name == "fresh"


def test_a_watched_folder_is_followed(policed: Running, tmp_path: Path, vocab_size: int) -> None:
    policies = policed.policies
    watched = PolicyFolder(policies, tmp_path)
    watched.look()
    known = [stored.name for stored in policies.list()]
    write(tmp_path / "fresh", vocab_size, output_bias=-6.0)
    (tmp_path / "no policy").mkdir()
    (tmp_path / "empty").mkdir()
    watched.look()
    assert [stored.name for stored in policies.list()] == sorted([*known, "fresh"])
    slow = passes(policed.complete(**choose("fresh")))
    first = policies.get("fresh")
    watched.look()
    assert policies.get("fresh") is first, "what has not changed is not loaded again"
    write(tmp_path / "fresh", vocab_size, output_bias=6.0)
    watched.look()
    assert passes(policed.complete(**choose("fresh"))) < slow
    good = policies.get("fresh")
    (tmp_path / "fresh" / WEIGHTS).write_bytes(b"half a file")
    watched.look()
    assert policies.get("fresh") is good, "a broken checkpoint leaves the one before it"
    shutil.rmtree(tmp_path / "fresh")
    watched.look()
    assert [stored.name for stored in policies.list()] == known
