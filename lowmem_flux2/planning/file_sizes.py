"""What a component's files hold where they hold it quantized: bytes of each block as it is stored, and beside blocks.

Of other files a dtype says it all (`file_bytes`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_BLOCK: Final = re.compile(r"(?:^|\.)(?P<kind>layers|transformer_blocks|single_transformer_blocks)\.(?P<index>\d+)\.")

DECODED_WEIGHTS_PER_S: Final[Mapping[str, float]] = {"scaled": 286e6, "bnb4": 187e6, "gguf": 430e6, "sdnq": 187e6}
"""Weights that one thread decodes in a second while it reads them, by `stored.Encoding`: `runtime.checkpoint` on 3072 x
3072 from the page cache to bf16, best of four, torch 2.13 on an AMD EPYC (Zen 5) beside other work, 2026-11-26. GGUF's
is of Q4_K, Q6_K and Q4_0; Q8_0 took 1374e6, Q5_K 326e6. SDNQ's is not measured: the slowest of the others. Other
processors differ."""


@dataclass(frozen=True, slots=True)
class FileSizes:
    """Bytes in files, scales and the like included.

    Args:
        blocks: of each block that is used, in the order of use.
        other_bytes, other_weights: of all tensors beside them that are needed.
        encoding: the `stored.Encoding` that holds most of the blocks' weights.
    """

    blocks: tuple[int, ...]
    other_bytes: int
    other_weights: int
    encoding: str

    @property
    def decoded_weights_per_s(self) -> float:
        """Of one thread."""
        return DECODED_WEIGHTS_PER_S[self.encoding]


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of a component, as files hold it."""

    name: str
    num_bytes: int
    num_weights: int
    encoding: str


def file_sizes(tensors: list[Held]) -> FileSizes | None:
    """Of all tensors that are needed; None where none is quantized, or none is in a block."""
    blocks: Counter[tuple[bool, int]] = Counter()
    encodings: Counter[str] = Counter()
    other_bytes = other_weights = 0
    for tensor in tensors:
        if found := _BLOCK.search(tensor.name):
            blocks[found["kind"].startswith("single"), int(found["index"])] += tensor.num_bytes
            encodings[tensor.encoding] += tensor.num_weights if tensor.encoding != "plain" else 0
        else:
            other_bytes += tensor.num_bytes
            other_weights += tensor.num_weights
    if not any(encodings.values()):
        return None
    in_order = tuple(blocks[place] for place in sorted(blocks))
    return FileSizes(in_order, other_bytes, max(other_weights, 1), encodings.most_common(1)[0][0])
