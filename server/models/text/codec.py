"""Text to tokens and back, and chats to prompts: what a checkpoint's tokenizer files say."""

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

FEW = 4096
"""Tokens that are decoded with the interpreter's lock held."""


class TextTooLongError(ValueError):
    """A text is longer than asked for, which its length alone tells. `at_least`: number of its tokens."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the text has at least {at_least} tokens")
        self.at_least = at_least


class TextCodec:
    """A model's tokenizer and chat template. Safe to use from several threads.

    Args:
        tokenizer: whose truncation and padding, if it came with any, are switched off.
        template: the chat template, None if the model has none.
        special_tokens: the named ones, such as `bos_token` and `mask_token`.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None, special_tokens: Mapping[str, str]) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._learn_special_tokens()
        self._begin, self._end = _around(tokenizer)
        self._special_tokens = special_tokens
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """One more than the highest token id."""

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """The codec of a model folder. Raises ModelError."""
        settings = read_optional_json(folder / "special_tokens_map.json")
        own = read_optional_json(folder / "tokenizer_config.json")
        settings |= {name: value for name, value in own.items() if value is not None}
        with library_errors(folder / "tokenizer.json"):  # some faults of one show when it is used
            return cls(load_tokenizer(folder, settings), ChatTemplate.load(folder, settings), named_tokens(settings))

    def _learn_special_tokens(self) -> None:
        self._control = ControlTokens(self._tokenizer, self._template) if self._template is not None else None
        self._bytes = TokenBytes(self._tokenizer)
        self._bound = TokenBound(self._tokenizer)

    def make_special(self, ids: Iterable[int]) -> None:
        """Make those of these tokens special that were added to the vocabulary: the model has a use for them.

        A word of the vocabulary stays a word.
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
        """Token ids of a text. Special tokens written in it count as such.

        Half of a surrogate pair, which is no character, reads as U+FFFD.

        Args:
            add_special_tokens: put those around it that the tokenizer does, such as a beginning-of-sequence.
            most: raise TextTooLongError, at once, where the text is so long that it must have more tokens.
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
        """Token ids that ask the model for the next message. Raises ChatTemplateError.

        Control tokens written in messages are plain text; those that the template writes count.

        Args:
            messages: role, content (a text, or a list of parts with a text) and whatever else the template may read.
            add_special_tokens: as for texts. Templates write a beginning-of-sequence themselves.
            most: as for texts, of what the template makes of the messages.
        """
        if self._control is None:
            raise ChatTemplateError("this model has no chat template: send a prompt to /v1/completions instead")
        chat = [_whole_strings(message) for message in messages]
        ids = self._control.encode(chat, add_generation_prompt, lambda text: self.check_length(text, most))
        return [*self._begin, *ids, *self._end] if add_special_tokens else ids

    def check_length(self, text: str, most: int | None) -> None:
        """Raise TextTooLongError where the text is so long that it must have more tokens; None is no limit."""
        if most is not None and (at_least := self._bound.at_least(text)) > most:
            raise TextTooLongError(at_least)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids below 2^32 that stand for no token are left out."""
        # Of a batch, the library lets go of the interpreter's lock; of a few tokens it is not worth a thread.
        if len(ids) <= FEW:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        (text,) = self._tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """The text of one token by itself, special tokens by name; part of a character reads as U+FFFD."""
        return self._tokenizer.decode([id], skip_special_tokens=False)

    def token_name(self, id: int) -> str:
        """A token as the vocabulary has it, empty where the id stands for none."""
        return self._tokenizer.id_to_token(id) or ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, also where they are only part of a character."""
        return self._bytes.of(id)

    def is_byte(self, id: int) -> bool:
        """Whether the token stands for a byte that reads as text only together with the bytes beside it."""
        return self._bytes.is_byte(id)

    def silent(self, id: int) -> bool:
        """Whether texts leave the token out: a special one, or an id that stands for none."""
        return self._bytes.silent(id)

    def boundaries(self) -> Boundaries:
        """Tells of a growing list of tokens, silent ones left out, when its text is certain."""
        return Boundaries(self._bytes)

    def token_id(self, token: str) -> int | None:
        """The id of the token of that name, if there is one."""
        return self._tokenizer.token_to_id(token)

    def special_token(self, name: str) -> str | None:
        """The token that the tokenizer's settings give a role, such as `mask_token`, if they do."""
        return self._special_tokens.get(name)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that the text is, if it is just one."""
        id = self.token_id(text)
        return id if id is not None and self._bytes.is_special(id) else None


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    found = tokenizer.encode("a", add_special_tokens=True)
    start = found.special_tokens_mask.index(0) if 0 in found.special_tokens_mask else len(found.ids)
    return found.ids[:start], found.ids[start + len(plain) :]


def _whole_strings(value: Any) -> Any:
    """A JSON value with whole characters in all its texts."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {whole(key): _whole_strings(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole_strings(each) for each in value]
    return value
