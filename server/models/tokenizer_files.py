"""A checkpoint's tokenizer from its files, as Hugging Face's libraries read them."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.models.byte_bpe import load_byte_bpe
from server.models.files import ModelError
from server.models.tokenizer_settings import flagged_tokens, listed_tokens, named_tokens


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
    for content in sorted(flagged | (listed_tokens(settings) - set(added))):
        token = added.get(content) or AddedToken(content, normalized=False)
        if content in vocabulary and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])
    return tokenizer


def _from_file(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "vocab.json").is_file():
            return load_byte_bpe(folder)
        raise ModelError(f"{path}: no such file (a tokenizer in the format of the `tokenizers` library is needed)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path}: not a tokenizer: {' '.join(str(error).split())}") from None
