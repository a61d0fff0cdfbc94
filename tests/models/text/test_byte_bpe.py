"""Tokenizers without a `tokenizer.json`, against transformers' Qwen2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.models.files import ModelError
from server.models.text.codec import TextCodec
from tests.tiny_dream import ADDED, write_tokenizer

TEXTS = [
    "Tom has 3 apples. He'd buy 5 more; they've 1234 now?",
    "  two  spaces\n\n\ttab \r\n end   ",
    "naïve nai\u0308ve 漢字 🙂 \u00a0 x",
    "<|im_start|>user\nHi<|im_end|>\n<|mask|><|mask|> <|beginoftext|>",
    "I'M 'S don'T #### 8\n\n\n",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec.load(folder)


@pytest.fixture(scope="module")
def second_opinion(folder: Path) -> Any:
    from transformers import AddedToken, Qwen2Tokenizer

    entries = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    pairs = (folder / "merges.txt").read_text().split("\n")[1:-1]
    tokenizer = Qwen2Tokenizer(
        json.loads((folder / "vocab.json").read_text()), [tuple(pair.split(" ")) for pair in pairs]
    )
    tokenizer.add_tokens([AddedToken(**entry) for entry in entries.values()])
    return tokenizer


def test_the_ids_are_those_of_transformers(codec: TextCodec, second_opinion: Any) -> None:
    for text in TEXTS:
        expected = second_opinion.encode(text, add_special_tokens=False)
        assert codec.encode(text) == expected
        assert codec.decode(expected, False) == second_opinion.decode(expected)


@settings(max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_has_the_ids_of_transformers(codec: TextCodec, second_opinion: Any, text: str) -> None:
    assert codec.encode(text) == second_opinion.encode(text, add_special_tokens=False)


def test_merges_and_added_tokens_are_used(codec: TextCodec) -> None:
    assert len(codec.encode("Tom has apples")) == 3
    assert [codec.token_id(token) for token in ADDED] == list(range(codec.vocab_size - len(ADDED), codec.vocab_size))
    assert codec.decode(codec.encode("a<|mask|>")) == "a"
    assert codec.decode(codec.encode_chat([{"role": "user", "content": "Hi"}]), False) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, True])
def test_tokens_around_a_text_are_those_of_transformers(tmp_path: Path, bos: bool | None, eos: bool | None) -> None:
    from transformers import Qwen2Tokenizer

    asked = {"add_bos_token": bos, "add_eos_token": eos}
    given = {name: value for name, value in asked.items() if value is not None}
    write_tokenizer(tmp_path, tokenizer_class="Qwen2Tokenizer", **given)
    expected = Qwen2Tokenizer.from_pretrained(tmp_path).encode("Tom has")
    assert TextCodec.load(tmp_path).encode("Tom has", add_special_tokens=True) == expected


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer_config.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def renumber(settings: dict[str, Any]) -> None:
    *_, last = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"]["9999"] = settings["added_tokens_decoder"].pop(last)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no merges": (lambda f: (f / "merges.txt").unlink(), "merges.txt: No such file or directory"),
    "merges no text": (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "merges.txt: 'utf-8' codec"),
    "no pair": (lambda f: (f / "merges.txt").write_text("#version: 0.2\na b\na b c\n"), "line 3 is not a pair"),
    "another vocabulary": (lambda f: (f / "merges.txt").write_text("a b\nxyz abc\n"), "merges.txt: does not fit vocab"),
    "truncated vocabulary": (
        lambda f: (f / "vocab.json").write_bytes((f / "vocab.json").read_bytes()[:-50]),
        "vocab.json: not a JSON file",
    ),
    "ids no numbers": (lambda f: edit(f, lambda v: v.update(x="y"), "vocab.json"), "vocab.json: a token's id is no"),
    "no settings": (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json: No such file"),
    "another kind": (
        lambda f: edit(f, lambda s: s.update(tokenizer_class="GPT2Tokenizer")),
        "tokenizer_class = 'GPT2Tokenizer' without a tokenizer.json is not built",
    ),
    "a gap": (lambda f: edit(f, renumber), "added token '<|mask|>' cannot have the id 9999"),
    "added tokens a list": (
        lambda f: edit(f, lambda s: s.update(added_tokens_decoder=[1])),
        "added_tokens_decoder is not an object of token ids and tokens",
    ),
    "an added token without text": (
        lambda f: edit(f, lambda s: s.update(added_tokens_decoder={"7": {"special": True}})),
        "added_tokens_decoder is not an object of token ids and tokens",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = BROKEN[name]
    write_tokenizer(tmp_path)
    destroy(tmp_path)
    with pytest.raises(ModelError) as caught:
        TextCodec.load(tmp_path)
    line = str(caught.value)
    assert message in line and "\n" not in line and str(tmp_path) in line
