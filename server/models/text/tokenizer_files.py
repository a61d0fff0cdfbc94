"""Loading of a checkpoint's tokenizer files, as by Hugging Face's libraries."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.models.files import MAX_TOKENIZER, ModelError, is_there, read_bytes
from server.models.text.byte_bpe import load_byte_bpe
from server.models.text.tokenizer_settings import flagged_tokens, listed_tokens, named_tokens
from server.models.text.tokenizer_steps import check_steps


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Turn all exceptions of the library into ModelErrors: plain Exception, and panics, which are not even that."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ModelError(f"{path}: not a tokenizer: {error}") from None


def load_tokenizer(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """Load `tokenizer.json`, or the files of its slow form. Raises ModelError.

    Args:
        settings: content of `tokenizer_config.json` and `special_tokens_map.json`.
    """
    tokenizer = _from_file(folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    # Flags in the settings override the tokenizer's own; lists in the settings do not.
    flagged = {*named_tokens(settings).values(), *flagged_tokens(settings)}
    special = []
    for content in sorted(flagged | (listed_tokens(settings) - set(added))):
        token = added.get(content) or AddedToken(content, normalized=False)
        if content in vocabulary and not token.special:
            token.special = True
            special.append(token)
    tokenizer.add_special_tokens(special)  # in one call: each call makes the library read all of them again
    return tokenizer


def _from_file(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not is_there(path):
        if is_there(folder / "vocab.json"):
            return load_byte_bpe(folder)
        raise ModelError(f"{path}: no such file (a tokenizer in the format of the `tokenizers` library is needed)")
    content = read_bytes(path, MAX_TOKENIZER)
    with library_errors(path):
        tokenizer = Tokenizer.from_buffer(content)
        check_steps(tokenizer, path)
    return tokenizer
