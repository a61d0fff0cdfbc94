"""Streamed text: whole characters, nothing of a stop string, and all of it the same however it is cut."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.generation.assembly import Detokenizer, StopStrings
from server.models.text.codec import TextCodec
from server.training.tokenizer import END, MASK


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> TextCodec:
    return TextCodec.load(tiny_model)


def pieces(detokenizer: Detokenizer, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """What comes out when the tokens go in by so many at a time."""
    out, start = [], 0
    for size in [*sizes, len(tokens)]:
        out.append(detokenizer.add(tokens[start : start + size]))
        start += size
    return [*out, detokenizer.add([], last=True)]


SIZES = st.lists(st.integers(0, 4), max_size=30)


def plain(text: str) -> bool:
    """Whether no token in it is one that decoding leaves out; fresh examples hold whatever stands in the source."""
    return MASK not in text and END not in text


@given(text=st.text(max_size=30).filter(plain), sizes=SIZES)
def test_pieces_of_a_text_are_whole_characters(codec: TextCodec, text: str, sizes: list[int]) -> None:
    found = pieces(Detokenizer(codec), codec.encode(text), sizes)
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found)


@given(tokens=st.lists(st.integers(0, 470), max_size=30), sizes=SIZES)
def test_pieces_of_any_tokens_make_the_decoded_whole(codec: TextCodec, tokens: list[int], sizes: list[int]) -> None:
    assert "".join(pieces(Detokenizer(codec), tokens, sizes)) == codec.decode(tokens)


@pytest.mark.parametrize("text", ["Tom has 3 apples. ", "\ufffd", "🙂"])
def test_a_long_text_costs_no_more_per_token_than_a_short_one(
    codec: TextCodec, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    decoded = 0
    decode = codec.decode

    def counting(ids: list[int], skip_special_tokens: bool = True) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids, skip_special_tokens)

    monkeypatch.setattr(codec, "decode", counting)
    detokenizer, tokens = Detokenizer(codec), codec.encode(text * 100)
    for token in tokens:
        detokenizer.add([token])
    assert decoded < 10 * len(tokens)


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    sizes=SIZES,
)
def test_stop_strings_never_leak(text: str, stops: list[str], sizes: list[int]) -> None:
    machine, out, start = StopStrings(stops), [], 0
    for size in [*sizes, len(text)]:
        out.append(machine.add(text[start : start + size]))
        start += size
    out.append(machine.add("", last=True))
    whole = "".join(out)
    assert text.startswith(whole)
    assert not any(stop in whole for stop in stops)
    assert machine.stopped == any(stop in text for stop in stops)
    if not machine.stopped:
        assert whole == text


def test_text_that_may_become_a_stop_string_waits() -> None:
    machine = StopStrings(["###", "end"])
    assert machine.add("a #") == "a "
    assert machine.add("#") == ""
    assert machine.add(" e") == "## "
    assert machine.add("n", last=True) == "en"
    assert not machine.stopped
