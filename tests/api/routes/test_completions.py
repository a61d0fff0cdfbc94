"""/v1/completions through the openai client and by hand."""

import json
import math
from typing import Any

import pytest

from tests.api.models import needs_torch_engine
from tests.api.serving import NAME, PROMPT, Running


def test_the_clients_answer_has_text_usage_and_what_was_used(server: Running) -> None:
    with server.client() as client:
        answer = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=12)
    (choice,) = answer.choices
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == NAME
    assert choice.text and choice.finish_reason == "length" and choice.index == 0
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.text.encode(PROMPT))
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    told: Any = answer.to_dict()
    assert told["usage"]["completion_tokens_details"] == {"forward_passes": 12, "tokens_per_forward": 1.0}
    used = told["unmask"]
    assert used["sampler"] == "topk" and used["block_length"] is None and used["max_tokens"] == [12]


def test_streamed_text_is_the_text(server: Running) -> None:
    for fields in ({"n": 3, "temperature": 1.0, "seed": 5}, {"echo": True, "block_length": 4}):
        whole = server.complete(max_tokens=24, **fields)
        with server.client() as client:
            chunks = list(
                client.completions.create(
                    model=NAME,
                    prompt=PROMPT,
                    max_tokens=24,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=fields,
                )
            )
        texts: dict[int, str] = {}
        reasons: dict[int, str] = {}
        for chunk in chunks[:-1]:
            assert chunk.id == chunks[0].id and chunk.usage is None
            (choice,) = chunk.choices
            assert choice.index not in reasons, "nothing may follow the finish reason"
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        assert texts == {choice["index"]: choice["text"] for choice in whole["choices"]}
        assert reasons == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None and chunks[-1].usage.to_dict() == whole["usage"]


def test_the_stream_is_made_of_events(server: Running) -> None:
    answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "stream": True, "block_length": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(set(chunk) <= {"id", "object", "created", "model", "choices", "unmask"} for chunk in chunks)
    assert len([chunk for chunk in chunks if chunk["choices"][0]["text"]]) >= 4, "each block is told once it is settled"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


async def _collect(stream: Any) -> str:
    return "".join([chunk.choices[0].text async for chunk in stream])


@pytest.mark.asyncio
async def test_the_async_client(server: Running) -> None:
    async with server.async_client() as client:
        whole = await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8)
        stream = await client.completions.create(model=NAME, prompt=PROMPT, max_tokens=8, stream=True)
        assert await _collect(stream) == whole.choices[0].text


def test_prompts_in_all_their_forms(server: Running) -> None:
    ids = server.text.encode(PROMPT)
    other = "How many apples?"
    text = server.complete()["choices"][0]["text"]
    assert server.complete(prompt=ids)["choices"][0]["text"] == text
    several = server.complete(prompt=[PROMPT, other])
    assert [choice["index"] for choice in several["choices"]] == [0, 1]
    assert several["choices"][0]["text"] == text
    assert several["choices"][1]["text"] == server.complete(prompt=other)["choices"][0]["text"]
    assert several["usage"]["prompt_tokens"] == len(ids) + len(server.text.encode(other))
    lists = server.complete(prompt=[ids, server.text.encode(other)])
    assert [c["text"] for c in lists["choices"]] == [c["text"] for c in several["choices"]]
    assert server.complete(prompt="")["usage"]["prompt_tokens"] == 0


def test_several_choices_count_their_prompt_once(server: Running) -> None:
    answer = server.complete(n=3, temperature=1.5, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in answer["choices"]}) == 3
    assert answer["usage"]["prompt_tokens"] == len(server.text.encode(PROMPT))
    assert answer["usage"]["completion_tokens"] == 3 * 16


def test_a_seed_gives_the_same_again_and_each_choice_tells_its_own(server: Running) -> None:
    first = server.complete(n=2, temperature=1.0, seed=-7, sampler="random")
    assert first["unmask"]["seeds"] == [-7, -6]
    again = server.complete(temperature=1.0, seed=-6, sampler="random")
    assert again["choices"][0]["text"] == first["choices"][1]["text"]
    unseeded = server.complete(temperature=1.0, n=2, prompt=[PROMPT, PROMPT])
    assert len(set(unseeded["unmask"]["seeds"])) == 4
    replay = server.complete(temperature=1.0, seed=unseeded["unmask"]["seeds"][3])
    assert replay["choices"][0]["text"] == unseeded["choices"][3]["text"]


def test_seeds_wrap_at_64_bits(server: Running) -> None:
    answer = server.complete(n=2, seed=2**63 - 1, temperature=1.0)
    assert answer["unmask"]["seeds"] == [2**63 - 1, -(2**63)]


def test_echo_puts_the_prompt_first(server: Running) -> None:
    plain = server.complete()["choices"][0]["text"]
    assert server.complete(echo=True)["choices"][0]["text"] == PROMPT + plain
    assert server.complete(echo=True, prompt=server.text.encode(PROMPT))["choices"][0]["text"] == PROMPT + plain


def test_a_suffix_is_seen_and_counted_but_not_returned(server: Running) -> None:
    suffix = " So Tom has 8 apples now."
    answer = server.complete(suffix=suffix)
    assert answer["usage"]["prompt_tokens"] == len(server.text.encode(PROMPT)) + len(server.text.encode(suffix))
    assert answer["choices"][0]["text"] != server.complete()["choices"][0]["text"]
    assert suffix not in answer["choices"][0]["text"]


def test_the_region_fills_what_the_context_has_left_at_most_128(server: Running) -> None:
    short = server.post("/v1/completions", {"prompt": PROMPT, "sampler_params": {"k": 64}}).json()
    assert short["usage"]["completion_tokens"] == 128
    long = server.post("/v1/completions", {"prompt": [5] * 250, "sampler_params": {"k": 64}}).json()
    assert long["usage"]["completion_tokens"] == 256 - 250
    both = server.post("/v1/completions", {"prompt": [[5], [5] * 250], "sampler_params": {"k": 64}}).json()
    assert both["unmask"]["max_tokens"] == [128, 6]
    assert server.complete(prompt=[5] * 240, max_tokens=16)["usage"]["total_tokens"] == 256


def test_logprobs_are_those_of_the_commits(server: Running) -> None:
    answer = server.complete(logprobs=0, return_trajectory=True)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    committed = {
        position: (text, math.log(confidence))
        for step in choice["trajectory"]
        for position, text, confidence in zip(step["positions"], step["token_texts"], step["confidences"], strict=True)
    }
    expected = [committed[position] for position in range(16)]
    for token, (text, _) in zip(logprobs["tokens"], expected, strict=True):
        assert token == text or (text == "\ufffd" and token.startswith("bytes:\\x"))
    assert logprobs["token_logprobs"] == [log for _, log in expected]
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)


def test_a_trajectory_tells_every_forward_pass(ending_server: Running) -> None:
    fields = {"return_trajectory": True, "max_tokens": 32, "sampler_params": {"k": 2}}
    answer = ending_server.complete(**fields)
    (choice,) = answer["choices"]
    steps = choice["trajectory"]
    assert [step["forward"] for step in steps] == list(range(1, len(steps) + 1))
    assert answer["usage"]["completion_tokens_details"]["forward_passes"] == len(steps)
    positions = [p for step in steps for p in step["positions"] + step["filled"]]
    assert len(positions) == len(set(positions)) and set(positions) <= set(range(32))
    assert any(step["filled"] for step in steps)
    streamed = ending_server.post("/v1/completions", {"prompt": PROMPT, "stream": True, **fields})
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert [step for chunk in chunks for step in chunk["choices"][0]["trajectory"]] == steps


def test_no_trajectory_unless_asked_for(server: Running) -> None:
    assert "trajectory" not in server.complete()["choices"][0]


def test_end_of_text_stops_and_is_counted_but_not_shown(ending_server: Running) -> None:
    answer = ending_server.complete(max_tokens=32, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert "<|endoftext|>" not in choice["text"]
    assert answer["usage"]["completion_tokens"] == len(choice["logprobs"]["tokens"]) + 1
    assert answer["usage"]["completion_tokens"] < 32


def test_ignore_eos_goes_on_to_the_end(ending_server: Running) -> None:
    answer = ending_server.complete(max_tokens=32, ignore_eos=True)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 32


def test_fill_after_end_saves_forward_passes(ending_server: Running) -> None:
    on, off = (ending_server.complete(max_tokens=48, fill_after_end=value) for value in (True, False))
    assert on["unmask"]["fill_after_end"] and not off["unmask"]["fill_after_end"]
    used = [answer["usage"]["completion_tokens_details"]["forward_passes"] for answer in (on, off)]
    assert used[0] < used[1]


def test_a_stop_token_ends_the_text(server: Running) -> None:
    choice = server.complete(block_length=1, return_trajectory=True)["choices"][0]
    tokens = [step["tokens"][0] for step in choice["trajectory"]]
    stopped = server.complete(block_length=1, stop_token_ids=[tokens[4]])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == tokens.index(tokens[4]) + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: Running, stream: bool) -> None:
    text = server.complete(block_length=1, max_tokens=64)["choices"][0]["text"]
    stop = text[11:16]
    before = server.metrics()
    body = {"prompt": PROMPT, "max_tokens": 64, "block_length": 1, "stop": ["never there", stop], "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = server.post("/v1/completions", body)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        usage = chunks.pop()["usage"]
        got = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        usage, (choice,) = answer.json()["usage"], answer.json()["choices"]
        got, reason = choice["text"], choice["finish_reason"]
    assert got == text[: text.index(stop)]
    assert reason == "stop"
    assert usage["completion_tokens"] < 64, "the generation must have been ended"
    after = server.metrics()
    for name, count in (
        ("dllm_generation_tokens_total", usage["completion_tokens"]),
        ("dllm_forward_passes_total", usage["completion_tokens_details"]["forward_passes"]),
    ):
        assert after[(name, "topk")] - before.get((name, "topk"), 0) == count


def test_block_length_null_is_full_diffusion(server: Running) -> None:
    assert server.complete(block_length=None)["unmask"]["block_length"] is None
    blocks = server.complete(block_length=4, return_trajectory=True)
    assert blocks["unmask"]["block_length"] == 4
    order = [position // 4 for step in blocks["choices"][0]["trajectory"] for position in step["positions"]]
    assert order == sorted(order)


@needs_torch_engine
@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_a_cache_is_chosen_and_told(server: Running, mode: str) -> None:
    fields = {"block_length": 8, "max_tokens": 32, "sampler_params": {"k": 2}}
    exact, cached = server.complete(**fields), server.complete(cache=mode, **fields)
    assert exact["unmask"]["cache"] == "none" and cached["unmask"]["cache"] == mode
    assert cached["usage"]["completion_tokens_details"]["forward_passes"] == 16
    assert cached["choices"] == server.complete(cache=mode, **fields)["choices"]


def test_a_sampler_that_changes_its_mind(server: Running) -> None:
    """Text only comes once a block is done, and the trajectory tells what was replaced."""
    fields = {
        "sampler": "edit",
        "sampler_params": {"threshold": 0.05, "edit_threshold": 0.0, "max_post_steps": 3},
        "block_length": 8,
        "max_tokens": 24,
        "return_trajectory": True,
    }
    answer = server.complete(**fields)
    (choice,) = answer["choices"]
    assert any(step.get("replaced") for step in choice["trajectory"])
    final: dict[int, int] = {}
    for step in choice["trajectory"]:
        assert set(step.get("replaced", [])) <= set(final)
        final |= dict(zip(step["positions"], step["tokens"], strict=True))
    assert sorted(final) == list(range(24)) and answer["usage"]["completion_tokens"] == 24
    streamed = server.post("/v1/completions", {"prompt": PROMPT, "stream": True, **fields})
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


def test_fields_that_change_nothing_are_accepted(server: Running) -> None:
    neutral = {
        "best_of": 1,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "somebody",
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
        "temperature": None,
        "top_p": 1,
        "top_k": -1,
        "stop": None,
        "n": None,
        "seed": None,
        "stream": None,
        "stream_options": None,
        "suffix": None,
        "logprobs": None,
        "min_tokens": 0,
        "something_unheard_of": [1, 2],
    }
    assert server.complete(**neutral)["choices"][0]["text"] == server.complete()["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("include", [False, True])
def test_the_usage_so_far_comes_with_each_chunk_if_asked_for(server: Running, path: str, include: bool) -> None:
    chat = path.endswith("chat/completions")
    asked = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": [PROMPT, "8"]}
    options = {"continuous_usage_stats": True, "include_usage": include}
    body = {**asked, "max_tokens": 12, "n": 2, "block_length": 2, "stream": True, "stream_options": options}
    lines = server.post(path, body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    whole = server.post(path, {name: value for name, value in body.items() if not name.startswith("stream")}).json()
    if include:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"] == whole["usage"]
    final: dict[int, Any] = {}
    for chunk in chunks:
        usage, index = chunk["usage"], chunk["choices"][0]["index"]
        assert usage["completion_tokens"] >= final.get(index, usage)["completion_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        final[index] = usage
    assert len(chunks) > 2 * len(final) and chunks[0]["usage"]["completion_tokens"] < 12
    assert [final[i]["completion_tokens"] for i in sorted(final)] == [12] * len(final)
    per_prompt = [final[i]["prompt_tokens"] for i in sorted(final)][::2]
    assert sum(per_prompt) == whole["usage"]["prompt_tokens"]
