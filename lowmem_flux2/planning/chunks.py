"""How a sequence is cut into chunks of tokens."""

from __future__ import annotations

CHUNK_STEP_TOKENS = 64
"""Chunks are multiples of this: matmul kernels tile rows by at most 64, and round a ragged tile differently."""


def chunk_bounds(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """(start, stop) of each chunk. The tail is merged into the last one, which is thus less than two chunks long.

    With ``chunk_tokens`` 0, or where there are less than two chunks of tokens, it is one chunk of all tokens.
    """
    count = max(tokens // chunk_tokens, 1) if chunk_tokens else 1
    starts = [index * chunk_tokens for index in range(count)]
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def largest_chunk(tokens: int, chunk_tokens: int) -> int:
    """Tokens of the longest chunk, the last."""
    start, stop = chunk_bounds(tokens, chunk_tokens)[-1]
    return stop - start
