"""A checkpoint's tokenizer from its files, as Hugging Face's libraries read them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.models.files import MOST_TOKENIZER, ModelError, is_there, read_bytes
from server.models.text.byte_bpe import load_byte_bpe
from server.models.text.tokenizer_settings import flagged_tokens, listed_tokens, named_tokens
from server.models.text.tokenizer_steps import check_steps


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Tell whatever the library raises as a ModelError: plain Exception, and for its panics not even that."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"{path}: not a tokenizer: {error}") from None


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """`tokenizer.json`, or the files of its slow form. Raises ModelError.

    Args:
        settings: what `tokenizer_config.json` and `special_tokens_map.json` say.
    """
    tokenizer = _from_file(folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    # The settings' word on a token counts more than the tokenizer's own, that of their lists less.
    flagged = {*named_tokens(settings).values(), *flagged_tokens(settings)}
    special = []
    for content in sorted(flagged | (listed_tokens(settings) - set(added))):
        token = added.get(content) or AddedToken(content, normalized=False)
        if content in vocabulary and not token.special:
            token.special = True
            special.append(token)
    tokenizer.add_special_tokens(special)  # at once: the library reads all of them again each time
    return tokenizer


def _from_file(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not is_there(path):
        if is_there(folder / "vocab.json"):
            return load_byte_bpe(folder)
        raise ModelError(f"{path}: no such file (a tokenizer in the format of the `tokenizers` library is needed)")
    content = read_bytes(path, MOST_TOKENIZER)
    with library_errors(path):
        tokenizer = Tokenizer.from_buffer(content)
        check_steps(tokenizer, path)
    return tokenizer
