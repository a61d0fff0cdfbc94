"""Text that comes out piece by piece is the decoded whole, for every kind of tokenizer and any tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.api.generation.assembly import Detokenizer, TokenTexts
from server.models.text.codec import TextCodec
from tests.kinds_of_tokenizers import KINDS, SPECIAL

TEXTS = [
    "hello the world, hell o",
    "  two  spaces\n\n\ttab",
    "naïve 漢字 🙂 你好",
    "a\ufffdb\ufffd",
    "he<think>llo</think> x",
]


@pytest.fixture(scope="module", params=KINDS)
def codec(request: Any) -> TextCodec:
    return TextCodec(KINDS[request.param](), None, {})


def whole(codec: TextCodec, ids: Sequence[int]) -> str:
    """What the library itself says."""
    tokenizer: Tokenizer = codec._tokenizer
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces(codec: TextCodec, ids: Sequence[int], sizes: Sequence[int]) -> Iterator[str]:
    detokenizer, start = Detokenizer(codec), 0
    for size in [*sizes, len(ids)]:
        yield detokenizer.add(ids[start : start + size])
        start += size
    yield detokenizer.add([], last=True)


SIZES = st.lists(st.integers(0, 5), max_size=20)


@st.composite
def tokens(draw: st.DrawFn, codec: TextCodec) -> list[int]:
    """Any ids at all, or those of texts with some changed: halves of characters, special tokens, no tokens."""
    any_id = st.integers(0, codec.vocab_size + 2)
    special = st.sampled_from([id for token in SPECIAL if (id := codec.token_id(token)) is not None])
    text = st.sampled_from(TEXTS).map(codec.encode)
    part = st.one_of(text, st.lists(any_id, max_size=6), st.lists(special, max_size=2))
    found = [id for ids in draw(st.lists(part, max_size=6)) for id in ids]
    cut = draw(st.integers(0, 3))
    return found[cut:] if draw(st.booleans()) else found[: len(found) - cut]


@given(data=st.data(), sizes=SIZES)
def test_pieces_make_the_whole(codec: TextCodec, data: st.DataObject, sizes: list[int]) -> None:
    ids = data.draw(tokens(codec))
    assert "".join(pieces(codec, ids, sizes)) == whole(codec, ids)
    assert "".join(pieces(codec, ids, [1] * len(ids))) == whole(codec, ids)


@given(data=st.data(), sizes=SIZES)
def test_the_parts_of_tokens_are_in_the_text(codec: TextCodec, data: st.DataObject, sizes: list[int]) -> None:
    ids = data.draw(tokens(codec))
    texts, start, found = TokenTexts(codec), 0, []
    for size in [*sizes, len(ids)]:
        found += texts.add(ids[start : start + size])
        start += size
    found += texts.add([], last=True)
    text = whole(codec, ids)
    assert [part.id for part in found] == ids
    assert [part.start for part in found] == sorted(part.start for part in found)
    assert all(0 <= part.start <= len(text) for part in found)
    if "\ufffd" not in text and codec.boundaries().certain_after(codec.encode("a")[-1]):
        assert b"".join(part.bytes for part in found) == text.encode()
        for part in found:
            if part.text is not None and part.bytes:
                assert text.startswith(part.text, part.start)


def test_a_character_comes_when_it_is_whole() -> None:
    codec = TextCodec(KINDS["byte_level"](), None, {})
    detokenizer = Detokenizer(codec)
    assert [detokenizer.add([id]) for id in codec.encode("a🙂b")] == ["a", "", "", "", "🙂", "b"]


def test_a_run_of_byte_tokens_is_all_or_nothing() -> None:
    """Two of the three bytes of a second character make the first one unreadable too, however they come."""
    codec = TextCodec(KINDS["gemma"](), None, {})
    you, good = (codec.encode(character) for character in "你好")
    assert len(you) == len(good) == 3
    ids = [*you, *good[:2]]
    assert whole(codec, ids) == "\ufffd" * 5
    detokenizer = Detokenizer(codec)
    assert [detokenizer.add([id]) for id in ids] == [""] * 5
    assert detokenizer.add([], last=True) == "\ufffd" * 5
    assert "".join(pieces(codec, [*ids, good[2], *codec.encode("a")], [3, 2])) == "你好a"


@pytest.mark.parametrize("kind", ["llama", "first_space"])
def test_only_the_texts_own_first_space_is_stripped(kind: str) -> None:
    codec = TextCodec(KINDS[kind](), None, {})
    ids = codec.encode("hello hello hello")
    assert len(ids) == 3
    assert list(pieces(codec, ids, [1, 1, 1]))[:3] == ["hello", " hello", " hello"]
    assert [part.text for part in TokenTexts(codec).add(ids)] == ["hello", " hello", " hello"]


def test_the_bytes_of_split_characters() -> None:
    for kind in ("byte_level", "gemma"):
        codec = TextCodec(KINDS[kind](), None, {})
        texts = TokenTexts(codec)
        found = texts.add(codec.encode("a你b")) + texts.add([], last=True)
        assert [part.bytes for part in found] == [b"a", b"\xe4", b"\xbd", b"\xa0", b"b"]
        assert [part.text for part in found] == ["a", None, None, None, "b"]
        assert [part.start for part in found] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("kind", ["llama", "first_space"])
@pytest.mark.parametrize(
    "names", [["<0x20>", "<0x6C>", "<0x72>", "a"], ["<0x20>", "<0x0A>"], ["<0x20>", "<0xC3>", "<0xA9>"]]
)
def test_a_space_that_is_stripped_has_no_bytes(kind: str, names: list[str]) -> None:
    """LLaMA's decoders take the first space from a text, also one that a byte token wrote."""
    codec = TextCodec(KINDS[kind](), None, {})
    ids = [id for name in names for id in ([codec.token_id(name)] if name.startswith("<") else codec.encode(name)[-1:])]
    texts = TokenTexts(codec)
    found = [*texts.add(ids), *texts.add([], last=True)]
    text = whole(codec, ids)
    assert not text.startswith(" ")
    assert b"".join(part.bytes for part in found) == text.encode()
    assert found[0].bytes == b"" and [part.start for part in found[:2]] == [0, 0]
