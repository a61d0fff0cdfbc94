"""Small tokenizers of all kinds that published checkpoints have."""

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.tiny import tiny_tokenizer

SPECIAL = ["<bos>", "<eos>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
THINK = ["<think>", "</think>"]
"""Added tokens that are not special: texts keep them."""
WORDS = ["hello", "hell", "he", "ll", "o", "wor", "ld", "the", "an"]


def add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return tokenizer


def _characters() -> list[str]:
    return sorted({chr(c) for c in range(33, 127)} | set("é漢字") | {"\n"})


def _merges(space: str) -> tuple[list[str], list[tuple[str, str]]]:
    pairs = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        (space, "hello"),
        ("o", "r"),
        ("w", "or"),
        (space, "wor"),
    ]
    return [a + b for a, b in pairs], pairs


def gemma() -> Tokenizer:
    """SentencePiece BPE as Gemma's: spaces replaced, bytes for what is not in the vocabulary, nothing put in front."""
    names, pairs = _merges("▁")
    # Control tokens are pieces of the vocabulary, in front of all others.
    pieces = ["<pad>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_characters(), *names]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, pairs, fuse_unk=True, byte_fallback=True, unk_token="<pad>"
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return add_tokens(tokenizer)


def llama() -> Tokenizer:
    """The same as LLaMA's: a space in front of each text, which decoding strips."""
    tokenizer = gemma()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def first_space() -> Tokenizer:
    """The same with the space in front of a text's beginning only, not of what follows a special token."""
    tokenizer = llama()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def unigram() -> Tokenizer:
    """Unigram with control tokens among its pieces, which it would find in plain text too."""
    pieces = ["<unk>", *SPECIAL, "▁", *_characters(), *(f"▁{word}" for word in WORDS), *WORDS]
    scores = [(piece, -1.0 if len(piece) > 1 else -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return add_tokens(tokenizer)


def word_piece() -> Tokenizer:
    """WordPiece as BERT's, with the cleaning of spaces before punctuation."""
    pieces = ["[UNK]", *SPECIAL, *_characters(), *WORDS, *(f"##{word}" for word in WORDS)]
    pieces += [f"##{character}" for character in _characters()]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return add_tokens(tokenizer)


def byte_level() -> Tokenizer:
    """Byte-level BPE as Qwen's and LLaDA's: added tokens after the vocabulary."""
    names, pairs = _merges("Ġ")
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + names
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+| ?[^\s\p{L}]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return add_tokens(tokenizer)


def suffixed() -> Tokenizer:
    """BPE whose words end in a mark, which reads as the space after all but the last."""
    pieces = [*_characters(), *(f"{c}</w>" for c in _characters())]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return add_tokens(tokenizer)


def words() -> Tokenizer:
    """Words without a decoder: a space between any two."""
    pieces = ["[UNK]", *WORDS, *_characters()]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return add_tokens(tokenizer)


def replacing() -> Tokenizer:
    """A decoder that changes text across tokens."""
    tokenizer = gemma()
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁▁", "\t"), decoders.Replace("▁", " ")])
    return tokenizer


def repeating() -> Tokenizer:
    """A decoder that reads repeated tokens as one."""
    tokenizer = gemma()
    tokenizer.decoder = decoders.CTC(pad_token="o", word_delimiter_token="▁")
    return tokenizer


def embedded() -> Tokenizer:
    """That of the models trained here."""
    return add_tokens(tiny_tokenizer())


KINDS: dict[str, Callable[[], Tokenizer]] = {
    build.__name__: build
    for build in (
        gemma,
        llama,
        first_space,
        unigram,
        word_piece,
        byte_level,
        suffixed,
        words,
        replacing,
        repeating,
        embedded,
    )
}
