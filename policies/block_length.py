"""Block lengths as policies and recipes name them."""


def within(block_length: int | None, gen_length: int) -> int | None:
    """The block length of a generation; None, full diffusion, if one block holds all of it."""
    return None if block_length is None or block_length >= gen_length else block_length
