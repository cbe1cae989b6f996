"""Which Linears of the transformer rest in how many bits in ``nf4-mixed``, in no more bytes than nf4's.

Measured on the trained ``shapes`` checkpoint alone (benchmarks/results/mixed-formats.json): an error in a weight shows
most in single-stream blocks and in the image's attention output of double-stream ones, least in the feed-forwards of
double-stream blocks. So these rest in 3 bits, and what that leaves is spent on a fifth bit: for that attention output,
then for the output projections of single-stream blocks, the first blocks first, then for their input projections, the
last blocks first, as long as it lasts. Everything else has 4 bits, and so have all layers of a text encoder: that of
``shapes`` is random, so there is nothing to measure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from lowmem_flux2.planning.linears import DOUBLE_LINEARS, SINGLE_LINEARS
from lowmem_flux2.planning.models import BlockSpec, TransformerSpec

USUAL_BITS = 4
_DOUBLE = {
    "attn.to_out.0": 5,
    "ff.linear_in": 3,
    "ff.linear_out": 3,
    "ff_context.linear_in": 3,
    "ff_context.linear_out": 3,
}
_INTO, _OUT_OF = SINGLE_LINEARS


def mixed_bits(blocks: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """By name, the bits of each Linear of each block, in the order of use; of Linears without one, ``USUAL_BITS``.

    Args:
        blocks: the weights of each Linear by its name in the block (diffusers').
    """
    bits = [{name: _DOUBLE[name] for name in block if name in _DOUBLE} for block in blocks]
    spare = sum(
        (USUAL_BITS - count) * blocks[at][name] for at, found in enumerate(bits) for name, count in found.items()
    )
    singles = [at for at, block in enumerate(blocks) if _INTO in block]
    for at, name in [*((at, _OUT_OF) for at in singles), *((at, _INTO) for at in reversed(singles))]:
        if blocks[at][name] <= spare:
            bits[at][name] = USUAL_BITS + 1
            spare -= blocks[at][name]
    return bits


@lru_cache(maxsize=16)  # the planner asks for few models many times
def mixed_blocks(dims: TransformerSpec) -> tuple[BlockSpec, ...]:
    """The transformer's blocks with the bits of their Linears."""
    names = [DOUBLE_LINEARS] * dims.num_double + [SINGLE_LINEARS] * dims.num_single
    weights = [
        {name: rows * columns for name, (rows, columns) in zip(each, block.linears, strict=True)}
        for each, block in zip(names, dims.blocks, strict=True)
    ]
    found = zip(dims.blocks, names, mixed_bits(weights), strict=True)
    specs = [replace(block, bits=tuple(bits.get(name, USUAL_BITS) for name in each)) for block, each, bits in found]
    known = {spec: spec for spec in specs}  # equal blocks are one object
    return tuple(known[spec] for spec in specs)


@lru_cache(maxsize=16)
def planes_shares(dims: TransformerSpec) -> tuple[float, float]:
    """Of the weights of all (double-stream, single-stream) blocks' Linears, the share in other than the usual bits."""
    blocks = mixed_blocks(dims)
    return _planes_share(blocks[: dims.num_double]), _planes_share(blocks[dims.num_double :])


def _planes_share(blocks: Sequence[BlockSpec]) -> float:
    weights = [
        (rows * columns, bits != USUAL_BITS)
        for block in blocks
        for (rows, columns), bits in zip(block.linears, block.bits, strict=True)
    ]
    return sum(count for count, lies in weights if lies) / max(sum(count for count, _ in weights), 1)
