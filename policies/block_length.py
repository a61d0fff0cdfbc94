"""Block lengths as policies and recipes name them."""


def within(block_length: int | None, gen_length: int) -> int | None:
    """Blocks as long as the generation are full diffusion, None."""
    return None if block_length is None or block_length >= gen_length else block_length
