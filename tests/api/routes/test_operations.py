"""What operators see: metrics that add up, OpenAPI, tokens, version."""

import asyncio
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.api.serving import NAME, PROMPT, Running, error_of, serving

SAMPLERS: list[dict[str, Any]] = [
    {"sampler": "random", "sampler_params": {"k": 2}},
    {"sampler": "topk"},
    {"sampler": "threshold", "sampler_params": {"threshold": 0.4}},
]


def mixture() -> list[dict[str, Any]]:
    """16 requests of three samplers, of different lengths, blocks and temperatures."""
    prompts = [PROMPT, "How many apples?", "Then the answer is", "8"]
    return [
        {
            "prompt": prompts[i % 4],
            "max_tokens": 8 + 3 * i,
            "block_length": [None, 4, 8][i % 3],
            "temperature": [0.0, 0.7][i % 2],
            "seed": i,
            "return_trajectory": True,
            **SAMPLERS[(i // 2) % 3],
        }
        for i in range(16)
    ]


async def _all_at_once(server: Running, bodies: list[dict[str, Any]]) -> list[Any]:
    async with server.async_client() as client:

        async def ask(body: dict[str, Any]) -> Any:
            known = {name: body[name] for name in ("prompt", "max_tokens", "temperature", "seed")}
            rest = {name: value for name, value in body.items() if name not in known}
            return await client.completions.create(model=NAME, **known, extra_body=rest)

        return await asyncio.gather(*[ask(body) for body in bodies])


def test_requests_in_flight_together_equal_each_alone_and_metrics_add_up(server: Running) -> None:
    alone = [server.complete(**body) for body in mixture()]
    before = server.metrics()
    together = asyncio.run(_all_at_once(server, mixture()))
    after = server.metrics()
    for one, other in zip(alone, together, strict=True):
        assert other.choices[0].text == one["choices"][0]["text"]
        tokens = [[step["positions"], step["tokens"]] for step in other.choices[0].to_dict()["trajectory"]]
        assert tokens == [[step["positions"], step["tokens"]] for step in one["choices"][0]["trajectory"]]
    assert after[("dllm_batch_rows_sum",)] - before[("dllm_batch_rows_sum",)] > (
        after[("dllm_batch_rows_count",)] - before[("dllm_batch_rows_count",)]
    ), "some must have shared a forward pass"

    def gain(name: str, *labels: str) -> float:
        return after.get((name, *labels), 0.0) - before.get((name, *labels), 0.0)

    usages = [answer.usage.to_dict() for answer in together]
    assert gain("dllm_prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    for sampler in ("random", "topk", "threshold"):
        mine = [a.usage.to_dict() for a in together if a.to_dict()["unmask"]["sampler"] == sampler]
        details = [usage["completion_tokens_details"] for usage in mine]
        finished = sum(gain("dllm_requests_total", reason, sampler) for reason in ("stop", "length"))
        assert finished == len(mine) == gain("dllm_tokens_per_forward_count", sampler)
        assert gain("dllm_generation_tokens_total", sampler) == sum(usage["completion_tokens"] for usage in mine)
        assert gain("dllm_forward_passes_total", sampler) == sum(detail["forward_passes"] for detail in details)
        ratios = sum(detail["tokens_per_forward"] for detail in details)
        assert gain("dllm_tokens_per_forward_sum", sampler) == pytest.approx(ratios)


def test_metrics_add_up_with_several_prompts_and_choices(server: Running) -> None:
    before = server.metrics()
    usage = server.complete(prompt=[PROMPT, "8"], n=3, suffix=" So", temperature=1.0)["usage"]
    after = server.metrics()
    for name, labels, count in (
        ("dllm_prompt_tokens_total", (), usage["prompt_tokens"]),
        ("dllm_generation_tokens_total", ("topk",), usage["completion_tokens"]),
        ("dllm_forward_passes_total", ("topk",), usage["completion_tokens_details"]["forward_passes"]),
        ("dllm_requests_total", ("length", "topk"), 6),
    ):
        assert after[(name, *labels)] - before.get((name, *labels), 0.0) == count


def test_metrics_carry_the_models_name_only(tiny_model: Path) -> None:
    with serving(tiny_model, served_name="org/name") as running:
        assert running.complete(model="org/name:topk")["model"] == "org/name:topk"
        assert running.get("/v1/models/org/name:topk").json()["parent"] == "org/name"
        text = running.get("/metrics").text
    names = set(re.findall(r'model_name="([^"]*)"', text))
    assert names == {"org/name"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_has_nothing_to_say(server: Running) -> None:
    server.complete()
    for accept in ("text/plain", "application/openmetrics-text; version=1.0.0"):
        assert server.get("/metrics", headers={"accept": accept}).headers["content-type"].startswith(accept[:12])
    text = server.get("/metrics").text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_openapi_has_a_schema_for_every_body_and_answer(server: Running) -> None:
    document = server.get("/openapi.json").json()
    text = str(document)
    schemas = document["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= set(schemas)
    assert "ValidationError" not in text and "'422'" not in text
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["tags"] and operation["summary"] and operation["description"], path
            assert ("requestBody" in operation) == (method == "post")
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert {"sampler", "block_length", "return_trajectory", "stop"} <= set(schemas["CompletionBody"]["properties"])
    assert schemas["CompletionBody"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    assert server.get("/docs").status_code == 200


def test_tokens_there_and_back(server: Running) -> None:
    text = "Tom has 3 apples. Gr\u00fc\u00dfe \U0001f34e<|endoftext|>"
    answer = server.post("/tokenize", {"prompt": text}).json()
    assert answer == {"count": len(answer["tokens"]), "max_model_len": 256, "tokens": server.text.encode(text)}
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["tokens"] == server.text.encode("user: Hi\nassistant:")


def test_tokens_that_are_none(server: Running) -> None:
    for path, body, param in (
        ("/detokenize", {"tokens": [5, 10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
    ):
        assert error_of(server.post(path, body), 400)["param"] == param


def test_version_health_and_readiness(server: Running) -> None:
    assert server.get("/version").json() == {"version": version("unmask")}
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
