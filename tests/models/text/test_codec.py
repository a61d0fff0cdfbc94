"""Tokenizer and chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from server.models.files import ModelError
from server.models.text.codec import ChatTemplateError, TextCodec
from tests.kinds_of_tokenizers import KINDS
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

Write = Callable[..., Path]
HELLO = [{"role": "user", "content": " Hi! "}]


def chat(codec: TextCodec, messages: list[Any]) -> str:
    """The prompt of a chat, by way of its tokens."""
    return codec.decode(codec.encode_chat(messages), skip_special_tokens=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a folder of tokenizer files."""

    def written(
        settings: Any = None, special_tokens: Any = None, jinja: str | None = None, padded: bool = False
    ) -> Path:
        tokenizer = tiny_tokenizer()
        if padded:
            tokenizer.enable_padding(length=32, pad_id=1, pad_token="<|endoftext|>")
            tokenizer.enable_truncation(max_length=4)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special_tokens)):
            if content is not None:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        if jinja is not None:
            (tmp_path / "chat_template.jinja").write_text(jinja)
        return tmp_path

    return written


def test_text_goes_there_and_back(write: Write) -> None:
    codec = TextCodec.load(write())
    for text in ("Tom has 3 apples.", " two  spaces\n\ttab", "naïve 漢字 🙂", ""):
        assert codec.decode(codec.encode(text)) == text
    assert codec.vocab_size == tiny_tokenizer().get_vocab_size()


def test_special_tokens_in_a_text_count_and_none_is_added(write: Write) -> None:
    codec = TextCodec.load(write())
    assert codec.encode("<|mdm_mask|><|endoftext|>") == [0, 1]
    assert codec.decode([0, 1]) == ""
    assert codec.decode([0, 1], skip_special_tokens=False) == "<|mdm_mask|><|endoftext|>"
    assert codec.token_id("<|endoftext|>") == 1 and codec.token_id("<|eot_id|>") is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_around_a_text_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    KINDS[kind]().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "bos_token": "<bos>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    second, codec = AutoTokenizer.from_pretrained(tmp_path), TextCodec.load(tmp_path)
    for text in ("a", "hello the world", " he<eos>llo <mask>", ""):
        assert codec.encode(text, add_special_tokens=True) == second.encode(text)
        assert codec.encode(text) == second.encode(text, add_special_tokens=False)
    assert codec.encode("a", add_special_tokens=True)[0] == codec.token_id("<bos>")


def test_whatever_the_tokenizer_puts_around_a_text_is_there(write: Write) -> None:
    folder = write()
    tokenizer = tiny_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|mdm_mask|> $A <|endoftext|>", special_tokens=[("<|mdm_mask|>", 0), ("<|endoftext|>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    codec = TextCodec.load(folder)
    inside = codec.encode("Tom has")
    assert codec.encode("Tom has", add_special_tokens=True) == [0, *inside, 1]
    message = [{"role": "user", "content": "Tom has"}]
    assert codec.encode_chat(message) == inside
    assert codec.encode_chat(message, add_special_tokens=True) == [0, *inside, 1]


def test_a_named_token_is_special_though_only_the_settings_say_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<mask>": 1, "a": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"mask_token": "<mask>", "pad_token": "<none>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    codec, second = TextCodec.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert codec.encode("a<mask>a") == second.encode("a<mask>a") == [2, 1, 2]
    assert codec.decode([2, 1, 2]) == second.decode([2, 1, 2], skip_special_tokens=True) == "a a"
    assert codec.special_token_id("<mask>") == 1 and codec.special_token_id("a") is None
    assert codec.vocab_size == 3, "a token without an id in the vocabulary is none"


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<role>"]},
        {"extra_special_tokens": {"role_token": "<role>"}},
        {"extra_special_tokens": ["<role>"]},
        {"role_token": "<role>"},
        {"added_tokens_decoder": {"2": {"content": "<role>", "special": True, "lstrip": True, "normalized": False}}},
        {},
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_which_tokens_are_special_is_what_transformers_says(
    tmp_path: Path, settings: dict[str, Any], added: bool
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<role>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if added:
        tokenizer.add_tokens([AddedToken("<role>", special=False, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    )
    codec, second = TextCodec.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert codec.encode("a<role>a") == second.encode("a<role>a")
    assert codec.decode([1, 2, 1]) == second.decode([1, 2, 1], skip_special_tokens=True)


def test_half_a_surrogate_pair_is_no_reason_to_fail(write: Write) -> None:
    codec = TextCodec.load(write())
    assert codec.decode(codec.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert codec.decode(codec.encode("\ud83d\ude42")) == "🙂", "both halves are a character"
    codec = TextCodec.load(write(jinja=CHAT_TEMPLATE))
    assert "a\ufffdb🙂" in chat(codec, [{"role": "user", "content": "a\ud800b\ud83d\ude42"}])


def test_tokens_one_by_one(write: Write) -> None:
    codec = TextCodec.load(write())
    ids = codec.encode("Tom has 3 apples")
    assert [codec.token(id) for id in ids] == ["Tom", " has", " 3", " apples"]
    assert codec.token(0) == "<|mdm_mask|>"
    assert [codec.token(id) for id in codec.encode("é")] == ["\ufffd", "\ufffd"]


def test_padding_and_truncation_of_the_file_are_switched_off(write: Write) -> None:
    codec = TextCodec.load(write(padded=True))
    assert codec.decode(codec.encode("Tom has 3 apples. How many?")) == "Tom has 3 apples. How many?"
    assert len(codec.encode("Tom")) == 1


def test_a_template_in_the_tokenizers_settings(write: Write) -> None:
    codec = TextCodec.load(write({"chat_template": CHAT_TEMPLATE}))
    assert codec.has_chat_template
    assert chat(codec, HELLO) == "user:  Hi! \nassistant:"


def test_a_template_in_a_file_comes_first(write: Write) -> None:
    codec = TextCodec.load(write({"chat_template": CHAT_TEMPLATE}, jinja="file: {{ messages[0].content | trim }}"))
    assert chat(codec, HELLO) == "file: Hi!"


def test_the_default_of_several_templates(write: Write) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert chat(TextCodec.load(write({"chat_template": named})), HELLO) == "plain"
    assert not TextCodec.load(write({"chat_template": named[:1]})).has_chat_template


def test_the_template_sees_special_tokens_as_texts_or_objects(write: Write) -> None:
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}{{ pad_token }}",
    }
    codec = TextCodec.load(write(settings, {"bos_token": "<older>", "unk_token": "<unk>"}))
    assert chat(codec, HELLO) == "<s> Hi! </s><unk>"


def test_the_published_llada_template(write: Write) -> None:
    template = (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
        "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    codec = TextCodec.load(write({"chat_template": template, "bos_token": "<|startoftext|>"}))
    assert chat(codec, HELLO) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_what_templates_may_use(write: Write) -> None:
    template = (
        "{%- for m in messages %}\n    {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "{{ m.content | tojson }}\n{%- endfor %}{{ strftime_now('%Y') | length }}"
        "{% if tools %}never{% endif %}{% if documents is not none %}never{% endif %}"
    )
    codec = TextCodec.load(write(jinja=template))
    messages = [{"role": "tool", "content": "x"}, {"role": "user", "content": '<é> "q"'}]
    assert chat(codec, messages) == '"<é> \\"q\\""4'


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[3].content }}", "has no element 3"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(1000000) %}{% endfor %}", "range"),
        ("{{ 1 // 0 }}", "division"),
    ],
)
def test_refusals_of_a_template_are_one_line(write: Write, template: str, why: str) -> None:
    codec = TextCodec.load(write(jinja=template))
    with pytest.raises(ChatTemplateError) as caught:
        chat(codec, HELLO)
    message = str(caught.value).lower()
    assert why.lower() in message and "\n" not in message


def test_no_template_is_said(write: Write) -> None:
    codec = TextCodec.load(write({}))
    assert not codec.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template"):
        chat(codec, HELLO)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"settings": "{"}, "tokenizer_config.json: not a JSON file"),
        ({"settings": "[]"}, "tokenizer_config.json: expected a JSON object, found list"),
        ({"special_tokens": "nope"}, "special_tokens_map.json: not a JSON file"),
        ({"settings": {"chat_template": 3}}, "chat_template is neither a text nor a list"),
        ({"settings": {"chat_template": [1]}}, "chat_template is a list, but not of names and templates"),
        ({"settings": {"chat_template": "{% if %}"}}, "tokenizer_config.json: chat template, line 1"),
        ({"jinja": "\n{{ nope"}, "chat_template.jinja: chat template, line 2"),
    ],
)
def test_broken_files_are_named(write: Write, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        TextCodec.load(write(**files))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '{"model": {"type": "BPE"}}', "\x00\x01"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: not a tokenizer") as caught:
        TextCodec.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file"):
        TextCodec.load(tmp_path)
