"""Several canvases a generation over HTTP: `smc` says nothing until one of them has won, and counts all of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.sampler_choice import default_sampler
from server.engine import RequestError
from server.settings import load_settings
from tests.api.serving import NAME, PROMPT, Running, error_of, serving, until

SMC: dict[str, Any] = {
    "sampler": "smc",
    "sampler_params": {"particles": 4, "base": "topk", "base_params": {"k": 2}},
    "temperature": 1,
    "block_length": 8,
    "seed": 7,
}


def passes(body: Any) -> int:
    forwards: int = body["usage"]["completion_tokens_details"]["forward_passes"]
    return forwards


def smc(**params: Any) -> dict[str, Any]:
    return SMC | {"sampler_params": SMC["sampler_params"] | params}


@pytest.fixture(scope="module")
def whole(server: Running) -> Any:
    return server.complete(**SMC, ignore_eos=True)


def test_all_canvases_count(server: Running, whole: Any) -> None:
    assert passes(whole) == 4 * 8
    assert whole["usage"]["completion_tokens"] == 16
    assert whole["unmask"]["sampler_params"] == {**SMC["sampler_params"], "ess": 0.5}


def test_one_particle_is_its_base(server: Running) -> None:
    base = {"sampler": "topk", "sampler_params": {"k": 2}, "temperature": 1, "block_length": 8, "seed": 7}
    alone, plain = server.complete(**smc(particles=1)), server.complete(**base)
    assert alone["choices"] == plain["choices"] and passes(alone) == passes(plain)


def test_a_stream_says_nothing_until_one_has_won(server: Running, whole: Any) -> None:
    fields = {**SMC, "ignore_eos": True, "max_tokens": 16, "prompt": PROMPT, "model": NAME}
    extra = {name: fields.pop(name) for name in ("sampler", "sampler_params", "block_length", "ignore_eos")}
    with server.client() as client:
        chunks: Any = list(
            client.completions.create(
                **fields, stream=True, stream_options={"include_usage": True}, logprobs=0, extra_body=extra
            )
        )
    told = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.text for choice in told) == whole["choices"][0]["text"]
    assert sum(len(choice.logprobs.token_logprobs) for choice in told) == 16
    assert chunks[-1].usage.to_dict() == whole["usage"]


def test_a_trajectory_is_the_winners(server: Running, whole: Any) -> None:
    (choice,) = server.complete(**SMC, ignore_eos=True, return_trajectory=True, logprobs=0)["choices"]
    assert choice["text"] == whole["choices"][0]["text"]
    told = choice["trajectory"]
    assert sorted(position for each in told for position in each["positions"]) == list(range(16))
    assert [len(each["positions"]) for each in told] == [2] * 8
    forwards = [each["forward"] for each in told]
    assert forwards == sorted(set(forwards)) and forwards[-1] == 32


def test_a_stop_within_the_winners_text(server: Running, whole: Any) -> None:
    text = whole["choices"][0]["text"]
    stop = next(character for character in text[4:] if character.isascii() and character not in text[:4])
    for stream in (False, True):
        with server.client() as client:
            answer: Any = client.completions.create(
                **{"model": NAME, "prompt": PROMPT, "max_tokens": 16, "stop": stop, "stream": stream},
                extra_body={**SMC, "ignore_eos": True},
            )
            told = [each.choices[0] for each in (answer if stream else [answer])]
        assert "".join(choice.text for choice in told) == text[: text.index(stop)]
        assert told[-1].finish_reason == "stop"


def test_choices_have_their_own(server: Running, whole: Any) -> None:
    both = server.complete(**SMC, ignore_eos=True, n=2)
    assert both["choices"][0]["text"] == whole["choices"][0]["text"]
    assert both["choices"][1]["text"] == server.complete(**SMC | {"seed": 8}, ignore_eos=True)["choices"][0]["text"]
    assert passes(both) == 64


def test_with_guidance_every_canvas_has_two_views(server: Running) -> None:
    assert (
        passes(server.complete(**SMC, ignore_eos=True, modifiers=[{"name": "guidance", "params": {"scale": 1}}])) == 64
    )


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        (smc(base="nope"), "sampler_params.base", "unknown sampler 'nope'"),
        (smc(base="smc", base_params={}), "sampler_params.base", "cannot be the base"),
        (smc(base="policy", base_params={}), "sampler_params.base", "cannot be the base"),
        (smc(base="edit", base_params={}), "sampler_params.base", "cannot be the base"),
        (smc(base_params={"k": 0}), "sampler_params.base_params.k", "greater than or equal to 1"),
        (smc(base_params={"k": "2"}), "sampler_params.base_params.k", "integer"),
        (smc(base_params={"threshold": 0.5}), "sampler_params.base_params.threshold", "not permitted"),
        (smc(base_params={"steps": 1}), "sampler_params.base_params.steps", "2 blocks"),
        (smc(base_params=[]), "sampler_params.base_params", "object"),
        (smc(particles=65), "sampler_params.particles", "less than or equal to 64"),
        (smc(base="credit", base_params={}), "temperature", "temperature 0"),
    ],
)
def test_wrong_choices_name_the_field(server: Running, fields: dict[str, Any], param: str, said: str) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | fields), 400)
    assert error["param"] == param and said in error["message"], error


@pytest.fixture(scope="module")
def narrow(tiny_model: Path) -> Iterator[Running]:
    """A server whose default is smc, with room for four canvases."""
    with serving(tiny_model, sampler="smc", sampler_params=SMC["sampler_params"], max_batch=4) as running:
        yield running


def test_it_can_be_the_servers_default(narrow: Running) -> None:
    body = narrow.complete(temperature=1, block_length=8)
    assert body["unmask"]["sampler"] == "smc" and passes(body) == 32
    assert narrow.complete(sampler="topk")["unmask"]["sampler"] == "topk"


@pytest.mark.parametrize(
    ("params", "field"),
    [({"base": "nope"}, "sampler_params.base"), ({"base": "diffusion_gemma"}, "sampler_params.base"), ({"k": 1}, "k")],
)
def test_a_default_that_cannot_be_is_a_wrong_setting(server: Running, params: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        default_sampler(load_settings({"sampler": "smc", "sampler_params": params}), server.engine.info)
    assert caught.value.field.endswith(field)


def test_more_canvases_than_a_forward_takes(narrow: Running) -> None:
    error = error_of(narrow.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | smc(particles=5)), 400)
    assert error["param"] == "sampler_params" and "has 5 canvases" in error["message"]
    assert "at most 4 (--max-batch)" in error["message"]


def test_one_that_is_left_half_way_ends(narrow: Running) -> None:
    with narrow.gate.closed():
        fields = {"prompt": PROMPT, "max_tokens": 200, "stream": True, **SMC}
        with narrow.http.stream("POST", "/v1/completions", json=fields) as answer:
            assert answer.status_code == 200
            until(lambda: narrow.gauges() == (1, 0))
    until(lambda: narrow.gauges() == (0, 0))
    assert passes(narrow.complete(temperature=1, block_length=8)) == 32
