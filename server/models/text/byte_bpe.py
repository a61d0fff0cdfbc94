"""Qwen2's tokenizer from the files of its slow form, the only form that Dream's checkpoints have.

`vocab.json` and `merges.txt` define the byte-level BPE; `tokenizer_config.json` has the added tokens.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from server.models.files import MAX_TOKENIZER, ModelError, read_json, read_text
from server.models.text.tokenizer_settings import named_tokens

MAX_IDS = 2**32
"""Limit of the tokenizers library."""

CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")
"""Values of `tokenizer_class` with the pre-tokenization below, which the two files do not specify."""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
"""Pieces never merged across: contractions, words, single digits, runs of symbols, line ends, white space."""


def load_byte_bpe(folder: Path) -> Tokenizer:
    """Load the tokenizer of a model folder without `tokenizer.json`. Raises ModelError."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    kind = settings.get("tokenizer_class")
    if kind not in CLASSES:
        raise ModelError(
            f"{path}: tokenizer_class = {kind!r} without a tokenizer.json is not built ({', '.join(CLASSES)} are)"
        )
    try:
        tokenizer = Tokenizer(models.BPE(_vocabulary(folder / "vocab.json"), _merges(folder / "merges.txt")))
    except ModelError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{folder / 'merges.txt'}: does not fit vocab.json: {' '.join(str(error).split())}") from None
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for id, token in _added(path, settings):
        tokenizer.add_tokens([token])
        # The library assigns the ids itself, from the end of the vocabulary on.
        if tokenizer.token_to_id(token.content) != id:
            raise ModelError(
                f"{path}: added token {token.content!r} cannot have the id {id}: ids must follow one another"
            )
    tokenizer.post_processor = _post_processor(tokenizer, settings)
    return tokenizer


def _post_processor(tokenizer: Tokenizer, settings: dict[str, Any]) -> processors.TemplateProcessing:
    """Post-processor that adds the tokens requested by `add_bos_token` and `add_eos_token` to a text."""
    names = named_tokens(settings)
    bos, eos = (
        [names[f"{kind}_token"]] if settings.get(f"add_{kind}_token") and f"{kind}_token" in names else []
        for kind in ("bos", "eos")
    )
    ids = {token: tokenizer.token_to_id(token) for token in bos + eos}
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, id) for token, id in ids.items() if id is not None],
    )


def _vocabulary(path: Path) -> dict[str, int]:
    found = read_json(path, MAX_TOKENIZER)
    if not all(isinstance(id, int) and 0 <= id < MAX_IDS for id in found.values()):
        raise ModelError(f"{path}: a token's id is no number from 0 to {MAX_IDS - 1}")
    return found


def _merges(path: Path) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(read_text(path, MAX_TOKENIZER).split("\n"), start=1):
        parts = line.split()
        if not parts or (number == 1 and parts[0].startswith("#version")):
            continue
        if len(parts) != 2:
            raise ModelError(f"{path}: line {number} is not a pair of tokens")
        found.append((parts[0], parts[1]))
    return found


def _added(path: Path, settings: dict[str, Any]) -> list[tuple[int, AddedToken]]:
    """Tokens of `added_tokens_decoder`, by ascending id."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        entries = {int(id): dict(entry) for id, entry in dict(settings.get("added_tokens_decoder", {})).items()}
        return [
            (id, AddedToken(entry["content"], **{name: bool(entry[name]) for name in flags if name in entry}))
            for id, entry in sorted(entries.items())
        ]
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: added_tokens_decoder is not an object of token ids and tokens") from None
