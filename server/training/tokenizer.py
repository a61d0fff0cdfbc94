"""Tokenizer of a small model: one token for each word or number of the tasks, bytes for everything else.

Unigram over byte-level characters: all 256 bytes are pieces, so that any UTF-8 text encodes without unknown tokens
and decodes exactly.
"""

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

MASK, END = "<|mdm_mask|>", "<|endoftext|>"
# A word, a number of at most two digits or a run of symbols, each with a leading space; else one space or newline.
SPLIT = r" ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s"


def words_of(texts: list[str]) -> list[str]:
    """All pieces that occur in the texts, sorted."""
    return sorted({piece for text in texts for piece in re.findall(SPLIT, text)})


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """Build a tokenizer with one token for each piece of `texts` and for each number 0 to 99, with and without a space.

    Ids: mask, end-of-text, 256 bytes, " 0" ... " 99", "10" ... "99", then words.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    numbers = [f" {n}" for n in range(100)] + [str(n) for n in range(10, 100)]
    words = [word for word in words_of(texts) if word not in set(numbers)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [byte_level.pre_tokenize_str(piece)[0][0] for piece in numbers + words]
    pieces = list(dict.fromkeys(pieces))
    special = [MASK, END]
    # A piece always beats its bytes: Unigram picks the segmentation with the highest sum of scores.
    scores = [(piece, 0.0) for piece in special] + [(piece, -10.0 if len(piece) == 1 else -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def number_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of 0 ... 99 in order: first with a leading space, then without."""
    spaced = [tokenizer.encode(f" {n}").ids for n in range(100)]
    bare = [tokenizer.encode(str(n)).ids for n in range(100)]
    ids = [[i for (i,) in row] for row in (spaced, bare)]
    return ids


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of a special token that the tokenizer has."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
