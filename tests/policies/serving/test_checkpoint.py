"""A policy's folder: what goes in comes out, and everything else is refused in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from policies.serving.checkpoint import CARD, MOST_CARD_BYTES, WEIGHTS, PolicyError, load_policy, save_policy
from policies.serving.resources import resources_of
from policies.serving.store import PolicyStore, ServedModel, UnknownPolicyError
from samplers import ParameterError, get_sampler
from samplers.learned.policy import PolicyParams
from samplers.resources import bound
from tests.policies.tiny import card, network

HOST = ServedModel("LLaDAModelLM", 12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(network(), card(), tmp_path / "p")
    return tmp_path / "p"


def test_a_policy_comes_back_as_it_was(folder: Path) -> None:
    made, (found, found_card) = network(), load_policy(folder)
    assert found_card == card()
    assert sorted(path.name for path in folder.iterdir()) == [CARD, WEIGHTS]
    for name, value in made.state_dict().items():
        assert found.state_dict()[name].equal(value)
    assert not any(p.requires_grad for p in found.parameters())


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def edit_card(**changes: object) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps(content | changes))

    return apply


def replace_by_pipe(folder: Path) -> None:
    (folder / CARD).unlink()
    os.mkfifo(folder / CARD)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "policy.safetensors: No such file"),
        (lambda f: (f / CARD).unlink(), "policy.json: No such file"),
        (lambda f: (f / WEIGHTS).write_bytes(b""), "not a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a safetensors file"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04pickle" * 9), "not a safetensors file"),
        (lambda f: (f / CARD).write_text("{"), "Invalid JSON"),
        (lambda f: (f / CARD).write_text("[]"), "policy.json: Input should be"),
        (lambda f: (f / CARD).write_bytes(b" " * (MOST_CARD_BYTES + 1)), "more than 1048576 bytes"),
        (replace_by_pipe, "policy.json: a named pipe, not a file"),
        (edit_card(format=2), "format: Input should be 1"),
        (edit_card(colour="red"), "colour: Extra inputs"),
        (edit_card(config={"hidden": 16, "heads": 2, "feedforward": 24, "top": 0}), "config.top: Input should be"),
        (edit_card(config={"hidden": 32, "heads": 2, "feedforward": 24}), "has shape"),
        (edit_card(config={"hidden": 16, "heads": 2, "feedforward": 24, "takes_speed": True}), "lacks tensor"),
        (edit(lambda t: t.update(extra=torch.zeros(1))), "has unknown tensor 'extra'"),
        (edit(lambda t: t.pop("head.bias")), "lacks tensor 'head.bias'"),
        (edit(lambda t: t.update({"head.bias": torch.zeros(2)})), "head.bias has shape \\[2\\]"),
        (edit(lambda t: t.update({"head.bias": torch.tensor([torch.nan])})), "head.bias holds a value that is not"),
        (edit(lambda t: t.update({"head.bias": torch.tensor([torch.inf])})), "head.bias holds a value that is not"),
        (edit(lambda t: t.update({"head.bias": torch.zeros(1, dtype=torch.float16)})), "not float32"),
    ],
)
def test_what_is_no_policy_is_refused(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(PolicyError, match=message) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)


def test_a_store_hands_out_what_it_loaded(folder: Path) -> None:
    store = PolicyStore(HOST)
    resources, policy, topk = resources_of(store), get_sampler("policy"), get_sampler("topk")
    params, nameless = PolicyParams(policy="a"), PolicyParams()
    assert resources.why_missing(policy) == "no policy is loaded" and resources.why_missing(topk) is None
    with pytest.raises(ParameterError, match="no policy 'a' is loaded; loaded are none") as refused:
        bound(policy, params, resources)
    assert (refused.value.field, refused.value.code) == ("policy", "unknown_policy")
    for name in (None, "a"):
        with pytest.raises(UnknownPolicyError, match="none"):
            store.get(name)
    first = store.load("a", folder)
    assert store.get(None) is store.get("a") is first
    assert bound(policy, params, resources) is bound(policy, nameless, resources) is first.sampler
    assert bound(topk, topk.Params(), resources) is topk
    assert resources.named(policy, nameless) == params and resources.why_missing(policy) is None
    assert resources.warnings(policy, params, 4, 16) == first.warnings(HOST, 4, 16) != []
    second = store.load("a", folder)
    assert second.sampler is not first.sampler and store.get("a") is second
    store.load("b", folder)
    assert resources.named(policy, nameless) == nameless, "which of them?"
    assert [stored.name for stored in store.list()] == ["a", "b"]
    with pytest.raises(UnknownPolicyError, match="name a policy: loaded are a, b"):
        store.get(None)
    with pytest.raises(UnknownPolicyError, match="no policy 'c' is loaded; loaded are a, b"):
        store.get("c")
    assert store.remove("a") is second
    assert resources.warnings(policy, params, 4, 16) == [], "what runs by it goes on"
    with pytest.raises(UnknownPolicyError):
        store.remove("a")


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".hidden", "a b", "a\n", "x" * 101, "a:b"])
def test_names_that_are_none(folder: Path, name: str) -> None:
    with pytest.raises(PolicyError, match="is no name for a policy"):
        PolicyStore(HOST).load(name, folder)


def test_a_failed_load_changes_nothing(folder: Path) -> None:
    store = PolicyStore(HOST)
    first = store.load("a", folder)
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(PolicyError):
        store.load("a", folder)
    assert store.get("a") is first


def test_a_policy_that_reads_tokens_serves_no_other_vocabulary(tmp_path: Path) -> None:
    save_policy(network(tokens=12), card(config={"tokens": 12}), tmp_path)
    PolicyStore(HOST).load("a", tmp_path)
    with pytest.raises(PolicyError, match="vocabulary of 12, but the model has 99"):
        PolicyStore(ServedModel("LLaDAModelLM", 99)).load("a", tmp_path)


@pytest.mark.parametrize(
    ("host", "block_length", "gen_length", "said"),
    [
        (HOST, None, 16, []),
        (HOST, 16, 16, []),
        (HOST, 8, 16, ["trained in full diffusion, and runs in blocks of 8"]),
        (HOST, None, 32, ["trained on 16 positions, and runs on 32"]),
        (ServedModel("Dream", 12), None, 16, ["another model"]),
        (ServedModel("LLaDAModelLM", 99), 8, 32, ["another model", "blocks of 8", "runs on 32"]),
    ],
)
def test_what_differs_from_the_training_is_said(
    folder: Path, host: ServedModel, block_length: int | None, gen_length: int, said: list[str]
) -> None:
    warnings = PolicyStore(host).load("a", folder).warnings(host, block_length, gen_length)
    assert len(warnings) == len(said)
    for warning, part in zip(warnings, said, strict=True):
        assert part in warning and "policy a" in warning


def test_settings_that_took_turns_in_training_are_all_known(tmp_path: Path) -> None:
    trained = {"gen_lengths": (16, 64), "block_lengths": (None, 8)}
    save_policy(network(), card(trained_on=trained), tmp_path)
    stored = PolicyStore(HOST).load("a", tmp_path)
    for block_length, gen_length in ((None, 16), (8, 64), (64, 64), (8, 16)):
        assert stored.warnings(HOST, block_length, gen_length) == []
    (warning,) = stored.warnings(HOST, 4, 16)
    assert "trained in full diffusion and blocks of 8, and runs in blocks of 4" in warning
    (warning,) = stored.warnings(HOST, None, 32)
    assert "trained on 16, 64 positions, and runs on 32" in warning
