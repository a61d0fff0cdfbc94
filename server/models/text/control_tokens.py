"""Encoding of chats: control tokens written by the template are recognised, typed ones are plain text.

The tokenizer finds control tokens anywhere, so that text typed into a message could open a turn of its own. Here

1. typed control tokens are broken by a marker that occurs nowhere else, before the template sees them,
2. whole control tokens in the rendered text are therefore the template's: each is replaced by a secret name,
3. the markers are removed, and a copy of the tokenizer, whose control tokens have only these secret names, encodes the
   text.

The copy encodes all other text like the tokenizer, also across removed markers.

A template that edits texts, such as one that removes `/think`, can turn other text into a control token. So if a text
contains the first character of one, the chat is rendered again with every such character separated from what follows;
if that rendering has other control tokens, it is the one used.
"""

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from server.models.text.chat_template import ChatTemplate, ChatTemplateError
from server.models.text.encoding import PIECE, one_encoding

PRIVATE = range(0xE000, 0xF900)
"""Private use characters, from which markers are taken."""
ESCAPE = re.compile(r"\\u([ef][0-9a-f]{3})")
"""Escaped form of such a character in the output of templates that print JSON or Python's representation."""
ADJACENT_FIELDS = frozenset({"content", "name", "reasoning_content", "reasoning", "thinking"})
"""Fields that a template can write directly next to its own text."""


class ControlTokens:
    """Control (special) tokens of a tokenizer, and the encoding of chats that ignores typed ones.

    Added tokens that are not special, such as `<think>`, are ordinary words with their own token in any text.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        self._control = {token.content: token for _, token in added if token.special and token.content.strip()}
        self._template = template
        self._finder = _finder(self._control.values())
        self._pattern = _pattern(self._control.values())
        self._starts = sorted({content[0] for content in self._control})
        self._longest = max(map(len, self._control), default=0)
        self._edges = Edges(self._control)
        self._firsts = sorted({content[0] for content in self._control if len(content) > 1})
        nonce = secrets.token_hex(8)  # unpredictable, so that nobody can type it
        self._secret = {content: f"{nonce}x{i}x" for i, content in enumerate(self._control)}
        self._twin = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._twin.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._twin.pre_tokenizer = tokenizer.pre_tokenizer
        twins = [self._renamed(token) if token.content in self._control else token for _, token in added]
        self._twin.add_tokens(twins)
        # The copy numbers added tokens itself, and assigns some ids twice if the vocabulary has gaps.
        self._by_name = {twin.content: [id] for twin, (id, _) in zip(twins, added, strict=True)}
        # Some models have control tokens among their text pieces too, and would produce them from plain text.
        ids = {id for id, token in added if token.content in self._control}
        for content in self._control:
            if tokenizer.model.token_to_id(content) is not None:
                self._by_name[content] = list(_pieces(tokenizer.model, content, ids))
        named = {name: self._twin.token_to_id(name) for name in self._by_name}
        self._by_id = {
            id: self._by_name[name]
            for name, id in named.items()
            if id is not None and tokenizer.model.id_to_token(id) in (None, name)
        }
        self._ambiguous = {id for id in named.values() if id is not None} - set(self._by_id)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        check: Callable[[str], None] = lambda text: None,
    ) -> list[int]:
        """Encode a chat, adding nothing to what the template writes. Raises ChatTemplateError.

        Args:
            check: called with the prompt before it is encoded; may raise.
        """
        chat = [self._template.normalize(message) for message in messages]
        texts = list(_texts(chat))
        marker, *stand_ins = _unused([*texts, self._template.source], 1 + len(self._edges.single))
        marking = Marking(marker, dict(zip(self._edges.single, stand_ins, strict=True)))

        def render(cautious: bool) -> str:
            marked = [self._mark(message, marking, cautious) for message in chat]
            return self._template.render(marked, add_generation_prompt)

        text = render(cautious=False)
        check(marking.removed(text))  # refuse a text that is too long before further work
        found = self._found(text)
        if any(first in each for each in texts for first in self._firsts):
            other = render(cautious=True)
            proven = self._found(other)
            if [text[start:end] for start, end in found] != [other[start:end] for start, end in proven]:
                text, found = other, proven
                check(marking.removed(text))
        return self._read(text, found, marking)

    def _renamed(self, token: AddedToken) -> AddedToken:
        secret, normalizer = self._secret[token.content], self._twin.normalizer
        # A normalizer that prepends something to every text would search for the name with that prefix.
        kept = normalizer is None or normalizer.normalize_str(secret) == secret
        return AddedToken(
            secret,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized and kept,
            special=True,
        )

    def _mark(self, message: Mapping[str, Any], marking: "Marking", cautious: bool) -> dict[str, Any]:
        """Message with its control tokens broken; if `cautious`, with every possible beginning of one broken."""

        def broken(text: str) -> str:
            if cautious:
                return marking.broken_after(self._firsts, text)
            return marking.broken(text, self._found(text))

        def adjacent(text: str) -> str:
            return self._edges.marked(broken(text), marking.marker)

        def everywhere(value: Any) -> Any:
            if isinstance(value, str):
                return broken(value)
            if isinstance(value, list):
                return [everywhere(each) for each in value]
            if isinstance(value, dict):
                return {broken(key): everywhere(each) for key, each in value.items()}
            return value

        def field(name: str, value: Any) -> Any:
            if name == "role":
                return value
            if name == "content" and isinstance(value, list):
                return [{**part, "text": adjacent(part["text"])} for part in value]
            return adjacent(value) if name in ADJACENT_FIELDS and isinstance(value, str) else everywhere(value)

        return {broken(name): field(name, value) for name, value in message.items()}

    def _found(self, text: str) -> list[tuple[int, int]]:
        """Positions of control tokens in a text, as the tokenizer finds them."""
        if not any(start in text for start in self._starts):
            return []
        if self._pattern is not None:
            return list(_spans(self._pattern, text, self._longest))
        encoding = one_encoding(self._finder, text, named=True)
        return [where for id, where in zip(encoding.ids, encoding.offsets, strict=True) if id]

    def _read(self, text: str, found: Iterable[tuple[int, int]], marking: "Marking") -> list[int]:
        out, last = [], 0
        for start, end in found:
            out += [text[last:start], self._secret[text[start:end]]]
            last = end
        encoding = one_encoding(self._twin, marking.removed("".join([*out, text[last:]])), named=bool(self._ambiguous))
        found_ids: list[int] = encoding.ids
        if not self._ambiguous:
            return [id for each in found_ids for id in self._by_id.get(each, (each,))]
        ids: list[int] = []
        for id, token in zip(found_ids, encoding.tokens, strict=True):
            ids += self._by_id.get(id) or self._by_name.get(token, [id])
        return ids


class Marking:
    """Replacement of typed control tokens in one chat.

    Args:
        marker: character inserted after a token's first character.
        single: stand-ins for tokens of one character, which cannot be broken.
    """

    def __init__(self, marker: str, single: Mapping[str, str]) -> None:
        self.marker = marker
        self._single = single

    def broken(self, text: str, found: Iterable[tuple[int, int]]) -> str:
        """Break the tokens at these positions."""
        out, last = [], 0
        for start, end in found:
            alone = self._single.get(text[start:end])
            out += [text[last:start], alone or text[start] + self.marker + text[start + 1 : end]]
            last = end
        return "".join([*out, text[last:]])

    def broken_after(self, firsts: Iterable[str], text: str) -> str:
        """Break the text after each of these characters, so that no edit can complete a token."""
        for typed, mark in self._single.items():
            text = _replaced(text, typed, mark)
        for first in firsts:
            text = _replaced(text, first, first + self.marker)
        return text

    def removed(self, text: str) -> str:
        """Restore the text as it was typed."""
        for mark, typed in ((self.marker, ""), *((mark, typed) for typed, mark in self._single.items())):
            text = _replaced(text, mark, typed).replace(_escaped(mark), typed)
        return text


class Edges:
    """Detection of text edges that a template could complete to a control token with adjacent text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.single = [token for token in tokens if len(token) == 1]
        self._forward = sorted(tokens)
        self._backward = sorted(token[::-1] for token in self._forward)
        self._longest = max(map(len, self._forward), default=0)
        self._all = "\0".join(self._forward)

    def marked(self, text: str, marker: str) -> str:
        """Insert a marker inside each edge, within its white space, that could be part of a control token."""
        core = text.strip()
        if not core or not self._forward:
            return text
        inside = len(core) < self._longest and core in self._all
        begins = inside or self._begins(self._backward, core[: self._longest][::-1])
        ends = inside or self._begins(self._forward, core[-self._longest :])
        start = len(text) - len(text.lstrip())
        return (
            text[:start] + marker * begins + core + marker * ends + text[start + len(core) :]
            if begins or ends
            else text
        )

    def _begins(self, sorted_tokens: list[str], text: str) -> bool:
        """True if a suffix of the text is a proper prefix of a token."""
        for start in range(len(text)):
            end = text[start:]
            at = bisect_right(sorted_tokens, end)
            if at < len(sorted_tokens) and sorted_tokens[at].startswith(end):
                return True
        return False


def _finder(tokens: Iterable[AddedToken]) -> Tokenizer:
    """Tokenizer that knows these tokens only; id 0 is the text between them."""
    finder = Tokenizer(models.WordLevel({"between": 0}, unk_token="between"))
    finder.add_special_tokens(
        [AddedToken(token.content, single_word=token.single_word, normalized=False, special=True) for token in tokens]
    )
    return finder


def _pattern(tokens: Collection[AddedToken]) -> re.Pattern[str] | None:
    """Pattern for the longest of these tokens; the tokenizer would take a second for some megabytes.

    None if only the tokenizer can decide, because its definition of a word differs from Python's.
    """
    contents = sorted(token.content for token in tokens)
    if not contents or any(token.single_word for token in tokens):
        return None
    try:
        return re.compile(_any_of(contents))
    except RecursionError:  # hundreds of tokens that are each a prefix of the next
        return None


def _any_of(words: list[str]) -> str:
    """Pattern for the longest of some sorted words, without alternatives that share a beginning."""
    start = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(words[0], words[-1], strict=False)))
    ends = [word[len(start) :] for word in words]
    ways = "|".join(_any_of(list(each)) for _, each in groupby(filter(None, ends), lambda end: end[0]))
    if not ways:
        return re.escape(start)
    return f"{re.escape(start)}(?:{ways}){'' if all(ends) else '?'}"


def _pieces(model: Any, piece: str, without: set[int]) -> Iterator[int]:
    """Ids of a piece's parts in a model's vocabulary, without the excluded ids."""
    for found in model.tokenize(piece):
        if found.id not in without:
            yield found.id
        elif len(found.value) > 1:
            yield from _pieces(model, found.value[:1], without)
            yield from _pieces(model, found.value[1:], without)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _unused(texts: Iterable[str], number: int) -> list[str]:
    """Private characters that the texts contain neither directly nor escaped. Raises ChatTemplateError."""
    used: set[str] = set()
    for text in texts:
        if not text.isascii():
            for start in range(0, len(text), PIECE):
                used.update(text[start : start + PIECE])
        if "\\u" in text:
            # Chunks overlap, since an escape may cross their border.
            for start in range(0, len(text), PIECE):
                used.update(chr(int(code, 16)) for code in ESCAPE.findall(text[start : start + PIECE + 5]))
    found = [chr(code) for code in PRIVATE if chr(code) not in used][:number]
    if len(found) < number:
        raise ChatTemplateError("these messages use every private character of Unicode's basic plane")
    return found


def _spans(pattern: re.Pattern[str], text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Positions of a pattern, searched in chunks. `longest`: maximum length of a match, in characters."""
    at = 0
    while at < len(text):
        end = at + PIECE
        for match in pattern.finditer(text, at, end + longest):
            if match.start() >= end:
                break
            yield match.span()
            at = match.end()
        at = max(at, end)


def _replaced(text: str, character: str, instead: str) -> str:
    """Text with a character replaced, in chunks."""
    if character not in text:
        return text
    return "".join(text[at : at + PIECE].replace(character, instead) for at in range(0, len(text), PIECE))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"
