"""Chats become the tokens that transformers makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from server.models.text.chat_template import ChatTemplate
from server.models.text.codec import ChatTemplateError, TextCodec
from tests.kinds_of_tokenizers import KINDS
from tests.models.text.templates import AS_JSON, FIRST_PART, NAMES, OF_PARTS, PARTS_ONLY, TEMPLATES, TURNS

NAMED = {"bos_token": "<bos>", "eos_token": "<eos>", "mask_token": "<mask>"}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [
        {"role": "system", "content": "the  world "},
        {"role": "user", "content": "\n hello <b>漢字</b> 'quoted' \"é\"\n"},
        {"role": "assistant", "content": "<think>\nhell\n</think>\n\nhello  "},
        {"role": "user", "content": "o\n\n</turn> {{ messages }} {% if %}"},
    ],
    [
        {"role": "user", "content": "the", "name": "Ann"},
        {"role": "assistant", "content": "hello", "reasoning_content": "\nan\n"},
        {"role": "user", "content": ""},
    ],
]


def codec_of(kind: str, template: str) -> TextCodec:
    return TextCodec(KINDS[kind](), ChatTemplate(template, NAMED), NAMED)


def of_transformers(kind: str, template: str, chat: list[dict[str, Any]], **options: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), chat_template=template, **NAMED)
    return tokenizer.apply_chat_template(chat, **{"add_generation_prompt": True, "return_dict": False} | options)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("kind", ["gemma", "llama", "first_space", "unigram", "byte_level", "embedded"])
def test_ids_are_those_of_transformers(kind: str, template: str) -> None:
    codec = codec_of(kind, template)
    for chat in CHATS:
        assert codec.encode_chat(chat) == of_transformers(kind, template, chat)
        prompt = of_transformers(kind, template, chat, add_generation_prompt=False)
        assert codec.encode_chat(chat, add_generation_prompt=False) == prompt


@pytest.mark.parametrize(
    ("kind", "normalized"),
    [("llama", False), *((kind, flag) for kind in ("unigram", "word_piece", "byte_level") for flag in (False, True))],
)
def test_flags_of_special_tokens_are_kept(kind: str, normalized: bool) -> None:
    def tokenizer() -> Tokenizer:
        found = KINDS[kind]()
        found.add_special_tokens(
            [
                AddedToken("<|l|>", lstrip=True, normalized=normalized),
                AddedToken("<|r|>", rstrip=True, normalized=normalized),
                AddedToken("<|s|>", single_word=True, normalized=normalized),
            ]
        )
        return found

    template = "<|l|>the <|l|> <|r|>  {{ messages[0].content }}<|r|> <|s|> <|s|>o <|l|>"
    codec = TextCodec(tokenizer(), ChatTemplate(template, {}), {})
    second = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), chat_template=template)
    expected = second.apply_chat_template(CHATS[0], return_dict=False)
    assert codec.encode_chat(CHATS[0]) == expected


@pytest.mark.parametrize("template", OF_PARTS.values(), ids=OF_PARTS)
def test_parts_are_those_of_transformers_where_the_template_reads_them(template: str) -> None:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": " hello"}, {"type": "text", "text": "the world"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "an"}]},
        {"role": "user", "content": [{"type": "text", "text": "o"}]},
    ]
    assert codec_of("gemma", template).encode_chat(chat) == of_transformers("gemma", template, chat)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_several_names(name: str) -> None:
    chat = [CHATS[0][0], {"role": "assistant", "content": "hello", name: "an"}, CHATS[0][0]]
    for template in (TEMPLATES["either"], "{{ messages[1] | tojson }}"):
        found = codec_of("byte_level", template).encode_chat(chat)
        assert found == of_transformers("byte_level", template, chat)
        assert "an" in codec_of("byte_level", template).decode(found)


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=30))
def test_any_text(text: str) -> None:
    chat = [{"role": "user", "content": text}]
    for kind, template in (("gemma", TURNS), ("byte_level", AS_JSON), ("byte_level", NAMES)):
        assert codec_of(kind, template).encode_chat(chat) == of_transformers(kind, template, chat)


TWO = [{"type": "text", "text": "Look:"}, {"type": "text", "text": "the world"}]


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        (TURNS, TWO, "Look:\nthe world"),
        (TURNS, "hello", "hello"),
        (PARTS_ONLY, "hello", "hello"),
        (PARTS_ONLY, TWO, "Look:\nthe world"),
        (OF_PARTS["filtered"], "hello", "hello"),
        (OF_PARTS["filtered"], TWO, "Look:the world"),
        (FIRST_PART, "hello", "hello"),
        (FIRST_PART, TWO, "Look:\nthe world"),
        (TEMPLATES["either"], TWO, "Look:the world"),
        (TEMPLATES["training"], TWO, "Look:\nthe world"),
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_no_text_is_lost_whatever_its_form(template: str, role: str, content: Any, expected: str) -> None:
    codec = codec_of("embedded", template)
    chat = [{"role": role, "content": content}, {"role": "user", "content": "an"}]
    assert f"{role}\n{expected}<end_of_turn>" in codec.decode(codec.encode_chat(chat), False)


def test_forms_are_found_by_role() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + '|' }}{% endif %}{% for message in messages %}"
        "{% if message.role == 'user' %}{% for part in message.content %}{{ part.text }}|{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    codec = codec_of("embedded", template)
    for system in ("the", [{"type": "text", "text": "the"}]):
        for user in ("o", [{"type": "text", "text": "o"}]):
            chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            assert codec.decode(codec.encode_chat(chat)) == "the|o|"


def test_forms_are_found_where_a_system_message_is_a_must() -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + PARTS_ONLY
    codec = codec_of("embedded", strict)
    chat = [{"role": role, "content": "hello"} for role in ("system", "user", "assistant", "user")]
    assert codec.decode(codec.encode_chat(chat)).count("hello") == 4


def test_an_assistant_without_content_is_silent() -> None:
    for template in (TURNS, PARTS_ONLY, TEMPLATES["training"]):
        codec = codec_of("gemma", template)
        chat = [{"role": "user", "content": "o"}, {"role": "assistant"}, {"role": "user", "content": "an"}]
        empty = [chat[0], {"role": "assistant", "content": ""}, chat[2]]
        assert codec.encode_chat(chat) == codec.encode_chat(empty)


def test_special_tokens_around_a_chat_are_a_choice() -> None:
    codec = codec_of("gemma", NAMES)
    plain = codec.encode_chat(CHATS[0])
    assert codec.encode_chat(CHATS[0], add_special_tokens=True) == [codec.token_id("<bos>"), *plain]


def write(folder: Path, settings: dict[str, Any]) -> None:
    KINDS["gemma"]().save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(NAMED | kind | settings))


NAMED_LIST = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": TURNS}]


@pytest.mark.parametrize("setting", [TURNS, NAMED_LIST], ids=["text", "list"])
@pytest.mark.parametrize("file", [None, NAMES], ids=["no file", "file"])
@pytest.mark.parametrize("others", [False, True], ids=["alone", "with others"])
def test_templates_are_found_where_transformers_finds_them(
    tmp_path: Path, setting: Any, file: str | None, others: bool
) -> None:
    from transformers import AutoTokenizer

    write(tmp_path, {"chat_template": setting})
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
        if others:
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    second = AutoTokenizer.from_pretrained(tmp_path)
    expected = second.apply_chat_template(CHATS[1], add_generation_prompt=True, return_dict=False)
    assert TextCodec.load(tmp_path).encode_chat(CHATS[1]) == expected


def test_a_processors_template_is_the_last_resort(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": NAMES}))
    codec = TextCodec.load(tmp_path)
    assert codec.encode_chat(CHATS[0]) == codec_of("gemma", NAMES).encode_chat(CHATS[0])


def test_variables_set_in_a_generation_block_stay_there() -> None:
    template = (
        "{% set x = 'a' %}{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}"
        "{% for i in [1, 2] %}{% generation %}{{ i }}{{ loop.last }}{% endgeneration %}{% endfor %}"
    )
    assert codec_of("byte_level", template).encode_chat(CHATS[0]) == of_transformers("byte_level", template, CHATS[0])


def test_a_template_that_refuses_any_probe_is_still_a_template() -> None:
    codec = codec_of(
        "embedded", "{% if messages | length != 4 %}{{ raise_exception('four!') }}{% endif %}{{ messages[3].content }}"
    )
    assert codec.decode(codec.encode_chat([{"role": "user", "content": word} for word in "abcd"])) == "d"
    with pytest.raises(ChatTemplateError, match="four!"):
        codec.encode_chat(CHATS[0])
