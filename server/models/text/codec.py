"""Encoding and decoding of text, and of chats as prompts, with a checkpoint's tokenizer files."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.models.files import read_optional_json
from server.models.text.chat_template import ChatTemplate, ChatTemplateError
from server.models.text.control_tokens import ControlTokens
from server.models.text.encoding import TokenBound, one_encoding, whole
from server.models.text.token_bytes import Boundaries, TokenBytes
from server.models.text.tokenizer_files import library_errors, load_tokenizer
from server.models.text.tokenizer_settings import named_tokens

__all__ = ["ChatTemplateError", "TextCodec", "TextTooLongError"]

SHORT_DECODE = 4096
"""Largest number of tokens decoded while holding the interpreter lock."""


class TextTooLongError(ValueError):
    """A text whose length alone shows that it has too many tokens. `at_least`: lower bound of its number of tokens."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the text has at least {at_least} tokens")
        self.at_least = at_least


class TextCodec:
    """A model's tokenizer and chat template. Thread-safe.

    Args:
        tokenizer: the tokenizer, whose truncation and padding are disabled.
        template: chat template; None if the model has none.
        special_tokens: named special tokens, such as `bos_token` and `mask_token`.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, special_tokens: Mapping[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._learn_special_tokens()
        self._begin, self._end = _surrounding_tokens(tokenizer)
        self._special_tokens = special_tokens
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest token id."""

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """Load the codec of a model folder. Raises ModelError."""
        settings = read_optional_json(folder / "special_tokens_map.json")
        own = read_optional_json(folder / "tokenizer_config.json")
        settings |= {name: value for name, value in own.items() if value is not None}
        with library_errors(folder / "tokenizer.json"):  # some faults of a tokenizer only appear when it is used
            return cls(load_tokenizer(folder, settings), ChatTemplate.load(folder, settings), named_tokens(settings))

    def _learn_special_tokens(self) -> None:
        self._control = ControlTokens(self._tokenizer, self._template) if self._template is not None else None
        self._bytes = TokenBytes(self._tokenizer)
        self._bound = TokenBound(self._tokenizer)

    def make_special(self, ids: Iterable[int]) -> None:
        """Mark tokens that the model uses as special, if they were added to the vocabulary.

        Tokens of the original vocabulary stay ordinary text.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        if plain := [added[id] for id in sorted(set(ids)) if id in added and not added[id].special]:
            for token in plain:
                token.special = True
            self._tokenizer.add_special_tokens(plain)
            self._learn_special_tokens()

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = False, most: int | None = None) -> list[int]:
        """Encode a text. Special tokens written in it are recognised.

        Lone surrogates, which are not characters, are read as U+FFFD.

        Args:
            add_special_tokens: add those that the tokenizer puts around a text, such as a beginning-of-sequence.
            most: raise TextTooLongError, without encoding, if the text must have more tokens than this.
        """
        text = whole(text)
        self.check_length(text, most)
        ids: list[int] = one_encoding(self._tokenizer, text, add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """Encode a chat as the prompt for the model's next message. Raises ChatTemplateError.

        Control tokens typed into messages are plain text; those written by the template are recognised.

        Args:
            messages: role, content (a text, or a list of text parts) and any other fields the template may read.
            add_special_tokens: as in `encode`. Templates write a beginning-of-sequence themselves.
            most: as in `encode`, for the rendered prompt.
        """
        if self._control is None:
            raise ChatTemplateError("this model has no chat template: send a prompt to /v1/completions instead")
        chat = [_whole_strings(message) for message in messages]
        ids = self._control.encode(chat, add_generation_prompt, lambda text: self.check_length(text, most))
        return [*self._begin, *ids, *self._end] if add_special_tokens else ids

    def check_length(self, text: str, most: int | None) -> None:
        """Raise TextTooLongError if the text must have more than `most` tokens; None is no limit."""
        if most is not None and (at_least := self._bound.at_least(text)) > most:
            raise TextTooLongError(at_least)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids below 2^32 without a token are skipped."""
        # Decoding a batch releases the interpreter lock, which is not worth it for few tokens.
        if len(ids) <= SHORT_DECODE:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """Text of a single token; the name of a special token; U+FFFD for part of a character."""
        return self._tokenizer.decode([id], skip_special_tokens=False)

    def token_name(self, id: int) -> str:
        """The token as spelled in the vocabulary; empty if the id has none."""
        return self._tokenizer.id_to_token(id) or ""

    def token_bytes(self, id: int) -> bytes:
        """Bytes of a token, which may be part of a character."""
        return self._bytes.of(id)

    def is_byte(self, id: int) -> bool:
        """True if the token is a single byte, whose text depends on the bytes beside it."""
        return self._bytes.is_byte(id)

    def silent(self, id: int) -> bool:
        """True if texts omit the token: a special token, or an id without one."""
        return self._bytes.silent(id)

    def boundaries(self) -> Boundaries:
        """Detector of the points in a growing list of tokens (without silent ones) at which the text is final."""
        return Boundaries(self._bytes)

    def token_id(self, token: str) -> int | None:
        """Id of the token with this name; None if there is none."""
        return self._tokenizer.token_to_id(token)

    def special_token(self, name: str) -> str | None:
        """Token with a role in the tokenizer's settings, such as `mask_token`; None if not set."""
        return self._special_tokens.get(name)

    def special_token_id(self, text: str) -> int | None:
        """Id of a special token from its text; None if the text is not exactly one special token."""
        id = self.token_id(text)
        return id if id is not None and self._bytes.is_special(id) else None


def _surrounding_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer adds before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    found = tokenizer.encode("a", add_special_tokens=True)
    start = found.special_tokens_mask.index(0) if 0 in found.special_tokens_mask else len(found.ids)
    return found.ids[:start], found.ids[start + len(plain) :]


def _whole_strings(value: Any) -> Any:
    """Copy of a JSON value with lone surrogates in its texts replaced."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {whole(key): _whole_strings(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole_strings(each) for each in value]
    return value
