"""Text to tokens and back, and chats to prompts: what a checkpoint's tokenizer files say."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from server.models.byte_bpe import load_byte_bpe
from server.models.files import ModelError, read_optional_json


class ChatTemplateError(ValueError):
    """These messages cannot be made into a prompt. One line that says why."""


class TextCodec:
    """A model's tokenizer and chat template. Safe to use from several threads.

    Args:
        tokenizer: whose truncation and padding, if it came with any, are switched off.
        template: the chat template, None if the model has none.
        special_tokens: what the template may refer to, such as `bos_token`.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template | None, special_tokens: dict[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = special_tokens
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest token id."""

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """The codec of a model folder. Raises ModelError."""
        tokenizer = _load_tokenizer(folder)
        settings = read_optional_json(folder / "tokenizer_config.json")
        named = read_optional_json(folder / "special_tokens_map.json") | settings
        return cls(tokenizer, _load_template(folder, settings.get("chat_template")), _special_tokens(named))

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in it count as such; none is added.

        Half of a surrogate pair, which is no character, reads as U+FFFD.
        """
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = self._tokenizer.encode(whole, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids below 2^32 that stand for no token are left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token(self, id: int) -> str:
        """The text of one token by itself, special tokens by name; part of a character reads as U+FFFD."""
        return self._tokenizer.decode([id], skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """The id of the token of that name, if there is one."""
        return self._tokenizer.token_to_id(token)

    def special_token(self, name: str) -> str | None:
        """The token that the tokenizer's settings give a role, such as `mask_token`, if they do."""
        return self._special_tokens.get(name)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """The text that asks the model for the next message. Raises ChatTemplateError."""
        if self._template is None:
            raise ChatTemplateError("this model has no chat template: send a prompt to /v1/completions instead")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._special_tokens
            )
        except Exception as error:  # a template is a program: what it raises depends on the messages
            why = " ".join(str(error).split()) or type(error).__name__
            raise ChatTemplateError(f"the model's chat template refuses these messages: {why}") from None


def _load_tokenizer(folder: Path) -> Tokenizer:
    """`tokenizer.json`, or what its slow form's files say."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "vocab.json").is_file():
            return load_byte_bpe(folder)
        raise ModelError(f"{path}: no such file (a tokenizer in the format of the `tokenizers` library is needed)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from None


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The `..._token` entries of the tokenizer's settings, written as strings or as objects with `content`."""
    found = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _load_template(folder: Path, setting: Any) -> Template | None:
    """`chat_template.jinja`, else the `chat_template` setting: a text, or a list of named ones with a "default"."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return _compile(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: {error}") from None
    if isinstance(setting, list):
        try:
            setting = {entry["name"]: entry["template"] for entry in setting}.get("default")
        except (TypeError, KeyError):
            raise ModelError(
                f"{folder / 'tokenizer_config.json'}: chat_template is a list, but not of names and templates"
            ) from None
    if setting is None:
        return None
    if not isinstance(setting, str):
        raise ModelError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list")
    return _compile(setting, folder / "tokenizer_config.json")


def _compile(source: str, path: Path) -> Template:
    """A template in the environment that Hugging Face's chat templates are written for, sandboxed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ModelError(f"{path}: chat template, line {error.lineno}: {error.message}") from None


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without HTML escapes, which jinja2's own filter would add."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
