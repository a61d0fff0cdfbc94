"""Chat template of a model: renders messages as the prompt for the next message."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from server.models.files import MAX_TEMPLATE, ModelError, is_there, read_optional_json, read_text
from server.models.text.template_worker import TemplateLimitError, TemplateRefusedError, template_workers
from server.models.text.tokenizer_settings import named_tokens

Message = Mapping[str, Any]
"""`role`, `content` (a text, or a list of text parts) and any other fields the template may read, as plain JSON."""
MessagePart = dict[str, str]
Form = Callable[[list[str]], str | list[MessagePart]]
"""Function from the texts of a message to its content, in one of the forms that templates read."""


class ChatTemplateError(ValueError):
    """Messages that cannot be rendered as a prompt. One line with the reason."""


def joined(texts: list[str]) -> str:
    """All parts as one text, joined by line breaks, as in vLLM and llama.cpp."""
    return "\n".join(texts)


def parts(texts: list[str]) -> list[MessagePart]:
    return [{"type": "text", "text": text} for text in texts]


def one_part(texts: list[str]) -> list[MessagePart]:
    return parts([joined(texts)])


REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Fields in which clients send an assistant's reasoning. Templates read the first, some the second."""
PROBES = ["first \\ text", "second \\ text"]
"""Texts to find in the prompt: a list printed as Python or JSON doubles the backslash, and so does not show them."""
PROBE_CHATS = {
    "user": [["user"], ["system", "user"]],
    "system": [["system", "user"]],
    "assistant": [["user", "assistant", "user"], ["system", "user", "assistant", "user"]],
}
"""Chats with which each role is tried, in this order: some templates require a system message."""


MAX_SOURCE = 1_000_000
"""Characters of a template; published ones have some thousands."""
PROBING_SECONDS = 10.0
"""Seconds that detecting the forms a template reads may take."""


class ChatTemplate:
    """A template, rendered in another process with limits on time and memory. Thread-safe.

    Templates expect content as a text, as a list of parts, or as either. The form is detected by rendering small chats
    when the template is loaded, because a template silently omits content in other forms.

    Args:
        source: text of the template.
        special_tokens: tokens that it may refer to, such as `bos_token`.

    Raises jinja2.TemplateSyntaxError, and TemplateLimitError if even small chats exceed the limits.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it is longer than {MAX_SOURCE} characters")
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        template_workers().compile(source)
        self._probing_ends = time.monotonic() + PROBING_SECONDS
        self._of_text: dict[str, Form] = dict.fromkeys(PROBE_CHATS, joined)
        self._of_parts: dict[str, Form] = dict.fromkeys(PROBE_CHATS, joined)
        for role in PROBE_CHATS:
            self._of_text[role] = self._first_visible(role, PROBES[:1], [joined, parts])
            self._of_parts[role] = self._first_visible(role, PROBES, [parts, joined, one_part])

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> "ChatTemplate | None":
        """Load the template of a model folder; None if it has none. Raises ModelError."""
        found = _source(folder, settings)
        if found is None:
            return None
        path, source = found
        try:
            return cls(source, named_tokens(settings))
        except TemplateSyntaxError as error:
            raise ModelError(f"{path}: chat template, line {error.lineno}: {error.message}") from None
        except TemplateLimitError as error:
            raise ModelError(f"{path}: chat template: {error}") from None

    def normalize(self, message: Message) -> dict[str, Any]:
        """Copy of a message with its content in the form that the template reads."""
        role, content = message["role"], message.get("content")
        if content is None:
            content = ""
        thought = next((message[name] for name in REASONING_FIELDS if message.get(name) is not None), None)
        if thought is not None:
            message = {"thinking": thought, **message, "reasoning_content": thought}
        forms, texts = (
            (self._of_text, [content])
            if isinstance(content, str)
            else (self._of_parts, [part["text"] for part in content])
        )
        return {**message, "content": forms.get(role, joined)(texts)}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Render messages in the template's form. Raises ChatTemplateError."""
        try:
            return self._render(messages, add_generation_prompt)
        except (TemplateRefusedError, TemplateLimitError) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from None

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
        }
        return template_workers().render(self.source, variables)

    def _first_visible(self, role: str, texts: list[str], forms: Sequence[Form]) -> Form:
        """First form in which a role's texts appear in the prompt; a plain text if there is none."""
        others: list[dict[str, Form]] = [self._of_text, dict.fromkeys(PROBE_CHATS, parts)]
        for form, turns, other in product(forms, PROBE_CHATS[role], others):
            chat = [{"role": each, "content": form(texts) if each == role else other[each](["text"])} for each in turns]
            if time.monotonic() > self._probing_ends:
                raise TemplateLimitError(f"some short chats take more than {PROBING_SECONDS:g} s")
            try:
                text = self._render(chat, True)
            except TemplateRefusedError:
                continue
            if all(each in text for each in texts):
                return form
        return joined


def _source(folder: Path, settings: dict[str, Any]) -> tuple[Path, str] | None:
    """Path and text of the template. A file of its own takes precedence over the tokenizer's settings."""
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        path = folder / name
        if is_there(path):  # a dangling link counts as present
            return path, read_text(path, MAX_TEMPLATE)
    for path, setting in (
        (folder / "tokenizer_config.json", settings.get("chat_template")),
        (folder / "chat_template.json", read_optional_json(folder / "chat_template.json").get("chat_template")),
    ):
        source = _default(path, setting)
        if source is not None:
            return path, source
    return None


def _default(path: Path, setting: Any) -> str | None:
    """The template, or the one named "default" if there are several."""
    if isinstance(setting, list):
        try:
            setting = {entry["name"]: entry["template"] for entry in setting}.get("default")
        except (TypeError, KeyError):
            raise ModelError(f"{path}: chat_template is a list, but not of names and templates") from None
    elif isinstance(setting, dict):
        setting = setting.get("default")
    if setting is not None and not isinstance(setting, str):
        raise ModelError(f"{path}: chat_template is neither a text nor a list")
    return setting
