"""Modifiers around a request's sampler: chosen, told, counted, and refused by name."""

from pathlib import Path
from typing import Any

import pytest

from samplers import list_modifiers
from tests.api.models import needs_torch_engine
from tests.api.serving import NAME, PROMPT, Running, error_of, serving
from tests.tiny_gemma import write_tiny_gemma

NEGATIVE = "He buys 5 more."


def guidance(scale: float = 1.5, **params: Any) -> list[dict[str, Any]]:
    return [{"name": "guidance", "params": {"scale": scale, **params}}]


def text(body: Any) -> str:
    found: str = body["choices"][0]["text"]
    return found


def passes(body: Any) -> int:
    forwards: int = body["usage"]["completion_tokens_details"]["forward_passes"]
    return forwards


def test_each_view_is_a_forward_pass(server: Running) -> None:
    plain, guided = server.complete(), server.complete(modifiers=guidance())
    assert passes(plain) == 16 and passes(guided) == 32
    assert text(guided) != text(plain)
    assert guided["usage"]["completion_tokens"] == 16
    assert server.complete(modifiers=guidance(0))["choices"] == plain["choices"], "no guidance at all"
    told = server.complete(modifiers=guidance(), return_trajectory=True)["choices"][0]["trajectory"]
    assert [each["forward"] for each in told] == list(range(2, 34, 2))


def test_what_was_used_is_told(server: Running) -> None:
    assert "modifiers" not in server.complete(modifiers=[])["unmask"]
    modifiers = [{"name": "spacing"}, *guidance(negative_prompt=NEGATIVE)]
    used = server.complete(modifiers=modifiers)["unmask"]["modifiers"]
    assert used == [
        {"name": "spacing", "params": {"min_gap_start": 8, "min_gap": 2}},
        {"name": "guidance", "params": {"scale": 1.5, "negative_prompt": NEGATIVE}},
    ]


def test_modifiers_may_be_where_vllms_clients_write_them(server: Running) -> None:
    here = server.complete(modifiers=guidance())
    there = server.complete(vllm_xargs={"modifiers": guidance()})
    assert here["choices"] == there["choices"] and here["unmask"]["modifiers"] == there["unmask"]["modifiers"]
    server.complete(modifiers=guidance(), vllm_xargs={"modifiers": guidance()})


def test_a_stream_by_the_openai_client(server: Running) -> None:
    with server.client() as client:
        fields: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 16}
        chunks: Any = list(
            client.completions.create(
                **fields, stream=True, stream_options={"include_usage": True}, extra_body={"modifiers": guidance()}
            )
        )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text(
        server.complete(modifiers=guidance())
    )
    assert chunks[-1].usage.to_dict()["completion_tokens_details"]["forward_passes"] == 32


def test_a_negative_prompt_is_encoded_as_prompts_are(server: Running) -> None:
    ids = server.post("/tokenize", {"prompt": NEGATIVE}).json()["tokens"]
    texts = [text(server.complete(modifiers=guidance(negative_prompt=each))) for each in (NEGATIVE, ids, None)]
    assert texts[0] == texts[1] != texts[2]


def test_in_a_chat_it_goes_through_the_template(server: Running) -> None:
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 16}
    ids = server.post("/tokenize", {"messages": [{"role": "user", "content": NEGATIVE}]}).json()["tokens"]
    found = [
        server.post("/v1/chat/completions", {**chat, "modifiers": guidance(negative_prompt=each)}).json()
        for each in (NEGATIVE, ids)
    ]
    assert found[0]["choices"] == found[1]["choices"]
    assert found[0]["usage"]["completion_tokens_details"]["forward_passes"] == 32


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"modifiers": [{"name": "nope"}]}, "modifiers.0.name", "choose from guidance, credit, spacing"),
        ({"modifiers": [*guidance(), {"name": "x" * 5000}]}, "modifiers.1.name", "unknown modifier"),
        ({"vllm_xargs": {"modifiers": [{"name": "nope"}]}}, "vllm_xargs.modifiers.0.name", "guidance"),
        ({"modifiers": guidance(-1)}, "modifiers.0.params.scale", "greater than or equal to 0"),
        ({"modifiers": [{"name": "guidance"}]}, "modifiers.0.params.scale", "missing"),
        ({"modifiers": guidance(size=1)}, "modifiers.0.params.size", "guidance has no parameter 'size'; it has: scale"),
        ({"modifiers": guidance(negative_prompt=[])}, "modifiers.0.params.negative_prompt", "at least 1"),
        ({"modifiers": guidance(negative_prompt=5)}, "modifiers.0.params.negative_prompt", "string"),
        ({"modifiers": guidance(negative_prompt=[-5])}, "modifiers.0.params.negative_prompt", "greater than"),
        ({"modifiers": guidance(negative_prompt=[10**6])}, "modifiers.0.params.negative_prompt", "not a token id"),
        (
            {"modifiers": guidance(negative_prompt="a <|mdm_mask|>")},
            "modifiers.0.params.negative_prompt",
            "the mask token",
        ),
        ({"modifiers": guidance(negative_prompt=[5] * 250)}, "modifiers.0.params.negative_prompt", "250 in the prompt"),
        ({"modifiers": guidance(negative_prompt="a " * 99_999)}, "modifiers.0.params.negative_prompt", "at least"),
        ({"modifiers": [*guidance(), *guidance()]}, "modifiers.1.name", "guidance is there twice"),
        ({"modifiers": [{"name": "spacing"}] * 9}, "modifiers", "8 items"),
        ({"modifiers": {"name": "spacing"}}, "modifiers", "array"),
        ({"modifiers": [{"name": "spacing", "scale": 1}]}, "modifiers.0.scale", "not known"),
        ({"modifiers": [{"params": {}}]}, "modifiers.0.name", "missing"),
        ({"sampler": "credit", "modifiers": [{"name": "credit"}]}, "modifiers", "so does sampler credit"),
        ({"modifiers": [{"name": "credit"}], "temperature": 1}, "temperature", "modifier credit chooses tokens itself"),
        ({"modifiers": guidance(), "vllm_xargs": {"modifiers": guidance(2)}}, "vllm_xargs.modifiers", "send one"),
        ({"cfg_scale": 1.5}, "cfg_scale", '"name": "guidance"'),
    ],
)
def test_what_makes_no_sense_names_the_field(server: Running, fields: dict[str, Any], param: str, said: str) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16} | fields), 400)
    assert error["param"] == param and said in error["message"]


def test_more_views_than_a_forward_takes(tiny_model: Path) -> None:
    with serving(tiny_model, max_batch=1) as running:
        assert passes(running.complete()) == 16
        answer = running.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 16, "modifiers": guidance()})
        error = error_of(answer, 400)
        assert error["param"] == "modifiers" and "has 2 canvases" in error["message"]
        assert "at most 1 (--max-batch)" in error["message"]


def test_modifiers_are_listed(server: Running) -> None:
    cards = [card for card in server.get("/v1/samplers").json()["data"] if card["kind"] == "modifier"]
    assert [card["id"] for card in cards] == [modifier.name for modifier in list_modifiers()]
    for card, modifier in zip(cards, list_modifiers(), strict=True):
        assert card == server.get(f"/v1/samplers/{card['id']}?kind=modifier").json()
        assert card["available"] and card["parameters"] == modifier.schema()
    assert server.get("/v1/samplers/guidance").json()["kind"] == "modifier"
    assert server.get("/v1/samplers/credit").json()["kind"] == "sampler"
    route = server.get("/openapi.json").json()["paths"]["/v1/samplers/{sampler}"]["get"]
    assert [parameter["name"] for parameter in route["parameters"]] == ["sampler", "kind"]
    assert error_of(server.get("/v1/samplers/topk?kind=modifier"), 404)["param"] == "sampler"
    document = server.get("/openapi.json").json()["components"]["schemas"]
    assert document["CompletionBody"]["properties"]["modifiers"] == document["ChatBody"]["properties"]["modifiers"]
    assert "modifiers" in document["EffectiveSettings"]["properties"]


@needs_torch_engine
def test_one_that_cannot_be_around_this_models_samplers(tmp_path: Path) -> None:
    with serving(write_tiny_gemma(tmp_path / "gemma"), sampler=None) as gemma:
        card = gemma.get("/v1/samplers/guidance").json()
        assert card["available"] is False and "and this one has none" in card["reason"]
        error = error_of(gemma.post("/v1/completions", {"prompt": PROMPT, "modifiers": guidance()}), 400)
        assert error["param"] == "modifiers" and error["message"] == card["reason"]
