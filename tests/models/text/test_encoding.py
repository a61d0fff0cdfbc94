"""A text's length bounds its tokens, and long texts are read without the interpreter's lock."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from server.models.text import codec as text_module
from server.models.text.chat_template import ChatTemplate
from server.models.text.codec import TextCodec, TextTooLongError
from server.models.text.encoding import UNICODE_FORMS, TokenBound
from tests.kinds_of_tokenizers import KINDS, SPECIAL, THINK
from tests.models.text.templates import TURNS

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
BOUNDED = ["gemma", "llama", "first_space", "byte_level", "replacing", "repeating", "embedded"]
CODECS = {kind: TextCodec(KINDS[kind](), ChatTemplate(TURNS, NAMED), NAMED) for kind in BOUNDED}
PIECES = st.sampled_from([*SPECIAL, *THINK, "hello", " ", "\n", "e\u0301", "\u1100\u1161\u11a8", "\u212b", "\u6f22"])
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=5)), max_size=20).map("".join)


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=TEXTS, times=st.sampled_from([1, 40]))
def test_no_text_has_fewer_tokens(kind: str, text: str, times: int) -> None:
    codec = CODECS[kind]
    assert codec._bound.at_least(text * times) <= len(codec.encode(text * times))


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_long_text_has_many(kind: str) -> None:
    for text in ("hello ", "hello " * 50, "\u6f22"):
        assert CODECS[kind]._bound.at_least(text * 10_000) > len(text.encode()) * 100


def changed(**parts: Any) -> Tokenizer:
    """A tokenizer that knows all bytes, with other parts."""
    tokenizer = KINDS["byte_level"]()
    tokenizer.normalizer = parts.get("normalizer")
    if "steps" in parts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([parts["steps"], pre_tokenizers.ByteLevel()])
    return tokenizer


def unknown(**options: Any) -> Tokenizer:
    """A tokenizer that does not know most characters."""
    return Tokenizer(models.BPE({"a": 0, "[UNK]": 1}, [], **options))


LOSING = {
    "what is replaced by nothing": (changed(normalizer=normalizers.Replace("a", "")), "a"),
    "a pattern": (changed(normalizer=normalizers.Replace(Regex("x+"), "y")), "x"),
    "accents": (changed(normalizer=normalizers.StripAccents()), "\u0301"),
    "what separates": (changed(steps=pre_tokenizers.Split(" ", "removed")), " "),
    "white space": (changed(steps=pre_tokenizers.WhitespaceSplit()), " "),
    "what is unknown, together": (unknown(unk_token="[UNK]", fuse_unk=True), "\u6f22"),
    "what is unknown, silently": (unknown(), "\u6f22"),
    "words": (KINDS["words"](), "x"),
    "pieces of words": (KINDS["word_piece"](), "x"),
    "unigrams": (KINDS["unigram"](), "\U0001f600"),
}


@pytest.mark.parametrize(("tokenizer", "lost"), LOSING.values(), ids=LOSING)
def test_nothing_is_said_where_a_text_of_any_length_can_be_one_token(tokenizer: Tokenizer, lost: str) -> None:
    long = lost * 3000
    assert len(tokenizer.encode(long, add_special_tokens=False).ids) <= 1000
    assert TokenBound(tokenizer).at_least(long) == 0


def test_an_unknown_character_is_a_token_each() -> None:
    assert TokenBound(unknown(unk_token="[UNK]")).at_least("\u6f22" * 100) == 60


def test_spaces_that_a_token_swallows_do_not_count() -> None:
    stripping = changed(normalizer=normalizers.Strip())
    swallowing = changed()
    swallowing.add_special_tokens([AddedToken("<swallow>", lstrip=True, normalized=False)])
    for tokenizer in (stripping, swallowing):
        text = " " * 100_000 + "<swallow>"
        assert TokenBound(tokenizer).at_least(text) <= 3
        assert TokenBound(tokenizer).at_least("hello" * 100_000) > 10_000


def test_normal_forms_and_lower_case_do_not_shrink_more_than_we_think() -> None:
    """Of each character: all that is taken together to become it, in its longest spellings."""
    every = [chr(code) for code in range(0x3400) if not 0xD800 <= code < 0xE000]
    for composed, apart in (("NFC", "NFD"), ("NFKC", "NFKD")):
        longest: dict[str, int] = {}
        for each in every:
            parts = unicodedata.normalize(apart, each)
            if len(parts) == 1:
                longest[parts] = max(longest.get(parts, 0), len(each.encode()), len(parts.encode()))
        for each in every:
            if unicodedata.normalize(composed, each) == each:
                parts = unicodedata.normalize(apart, each)
                spelled = sum(longest.get(part, len(part.encode())) for part in parts)
                assert spelled <= UNICODE_FORMS * len(each.encode()), each
    assert all(len(each.encode()) <= UNICODE_FORMS * len(each.lower().encode()) for each in every)


def test_a_text_that_is_too_long_never_becomes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = CODECS["embedded"]
    long = [{"role": "user", "content": "hello " * 10_000}]
    bytes_per_token = codec._bound.bytes_per_token
    assert bytes_per_token
    fits = "a" * (100 * bytes_per_token)
    assert len(codec.encode(fits, most=100)) > 100, "it might have been no more"

    def refused(*_: Any) -> None:
        raise AssertionError("it was made tokens")

    monkeypatch.setattr(text_module, "one_encoding", refused)
    monkeypatch.setattr(codec._control, "_read", refused)
    for encode in (lambda: codec.encode(fits + "a", most=100), lambda: codec.encode_chat(long, most=100)):
        with pytest.raises(TextTooLongError) as caught:
            encode()
        assert caught.value.at_least > 100


class Unlocked:
    """Of a tokenizer, what lets go of the interpreter's lock."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode_batch = tokenizer.encode_batch
        self.encode_batch_fast = tokenizer.encode_batch_fast
        self.decode_batch = tokenizer.decode_batch


@pytest.mark.parametrize("kind", ["embedded", "word_piece"])
def test_texts_chats_and_tokens_are_read_without_the_lock(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = TextCodec(KINDS[kind](), ChatTemplate(TURNS, NAMED), NAMED)
    chat = [{"role": "user", "content": "hello <mask>" * 2000}]
    text, ids, tokens = codec.encode("hello"), codec.encode_chat(chat), [5] * 10_000
    shown = codec.decode(tokens)
    monkeypatch.setattr(codec, "_tokenizer", Unlocked(codec._tokenizer))
    for part in ("_finder", "_twin"):
        monkeypatch.setattr(codec._control, part, Unlocked(getattr(codec._control, part)))
    assert codec.encode("hello") == text
    assert codec.encode_chat(chat) == ids
    assert codec.decode(tokens) == shown


def test_private_characters_are_looked_for_piece_by_piece() -> None:
    codec = CODECS["embedded"]
    for code in (0xE000, 0xE001):
        for typed in (chr(code), f"\\u{code:04x}"):
            for place in (65_533, 65_536, 131_069):
                content = ("a" * place + typed + "<mask>")[-70_000:] + "\ue000" * (code == 0xE001)
                shown = codec.decode(codec.encode_chat([{"role": "user", "content": content}]), False)
                assert content in shown


def test_normal_forms_count() -> None:
    tokenizer = changed(normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken("\uac01" * 9, normalized=True)])
    text = "\u1100\u1161\u11a8" * 900
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(found) == 100, "81 bytes a token"
    assert 0 < TokenBound(tokenizer).at_least(text) <= 100
