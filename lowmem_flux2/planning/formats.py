"""The weight formats: bytes with scales, transient, least GPU, and what each costs in fidelity.

The *stored* format is not the compute dtype: int8 and nf4 here are storage; a Linear's weight is expanded to the
compute dtype for its matmul (the transient) and dropped again. w8a8 alone computes in a class of its own: its weights
rest as int8's do, each token's input is quantized to int8 too, and integers are multiplied. Every stored tensor is
written down here once more than in `runtime.quantize`, so that planning needs no torch; tests compare both for every
block of every model.

What is quantized: the weights of Linears in blocks, 97.6 % of dev's transformer. What is not, and why:

- norm scales and biases: 0.001 % of a block, and as vectors they have no rows to share a scale;
- the embedders of latents, text, timestep and guidance, the modulation, norm_out and proj_out: few, read once a step or
  once a generation, and every block's input passes through them: quantized, they dominate the error of the result;
- the token embedding (only rows are read), the VAE (84 M weights).

int8 and int4 are optimum-quanto's qint8 and qint4, without that library: see `runtime.quantize`.

No format for bitsandbytes' LLM.int8: what it stores is `int8` here, one absmax a row, kept in fp32 there and in the
compute dtype here (tests compare: codes differ by at most one, errors by under 8 % in bf16, not at all in fp32). What
it adds is a matmul that keeps outlier columns in 16 bits, and no such matmul is used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from lowmem_flux2.planning.fidelity_figures import FIGURES, WEIGHT_ERRORS, FidelityFigures
from lowmem_flux2.planning.models import BlockSpec

ALIGNMENT_BYTES = 256
"""Every stored tensor starts at a multiple of this: Linear kernels round differently at other alignments."""
SECTOR_BYTES = 4096
"""Every block's span starts at a multiple of this and is as long: reads past the page cache want offset, length and
memory aligned to the device's logical block, 512 or 4096 bytes."""
PADDING_BESIDE_BLOCKS_BYTES = 24 << 10
"""Modules beside the blocks take at most so much more than their weights: a sector's rest for each, another for its
alignment, and each tensor's rest (test: the shipped configs, transformer and VAE, each part of a stage)."""
GROUP = 128
"""Weights that share a scale and a shift in int4 and int6 (optimum-quanto's default group size for qint4)."""
NF4_BLOCK, NF4_NESTED_BLOCK = 64, 256
"""bitsandbytes: weights per absmax, and absmax values per nested absmax (double quantization)."""

INT8_TOKENS, INT8_ROWS = 512, 16384
"""w8a8 multiplies so many tokens by so many rows of the weight at a time: its int32 products take 32 MiB at most, and
each matmul still fills a large GPU."""

Storage = Callable[[int, int, int], tuple[int, ...]]
"""(rows, columns, bytes of the compute dtype) of a Linear's weight -> bytes of each tensor that holds it."""


def group_size(columns: int) -> int:
    """128, or less where the row is not a multiple of it, in quanto's steps of 32; at last the whole row."""
    return next((size for size in range(GROUP, 0, -32) if columns % size == 0), columns)


def _int8(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    """One byte a weight, and a scale a row."""
    return rows * columns, rows * dtype_bytes


def _fp8(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    return (rows * columns,)


def _nf4(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    """Two weights a byte; an absmax in 8 bits per 64, a nested one in fp32 per 256 of those; an offset, two tables."""
    blocks = ceil(rows * columns / NF4_BLOCK)
    return ceil(rows * columns / 2), blocks, 4 * ceil(blocks / NF4_NESTED_BLOCK), 4, 4 * 16, 4 * 256


def mixed_storage(rows: int, columns: int, bits: int) -> tuple[int, ...]:
    """As nf4 in 4 bits; in others the high bit of each weight apart from its low ones, and a table of other length."""
    if bits == 4:
        return _nf4(rows, columns, 0)
    weights = rows * columns
    _, *scales, _, nested_levels = _nf4(rows, columns, 0)
    return ceil(weights * (bits - 1) / 8), *scales, 4 << bits, nested_levels, ceil(weights / 8)


def _int4(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    """Two weights a byte, and a scale and a shift per group."""
    group = group_size(columns)
    groups = rows * columns // group
    return groups * ceil(group / 2), groups * dtype_bytes, groups * dtype_bytes


def _int6(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    """Four weights in three bytes: their low four bits two a byte, their high two bits four a byte; scale and shift."""
    group = group_size(columns)
    groups = rows * columns // group
    return groups * (ceil(group / 2) + ceil(group / 4)), groups * dtype_bytes, groups * dtype_bytes


def _gguf(rows: int, columns: int, dtype_bytes: int) -> tuple[int, ...]:
    """As Q8_0, 34 bytes per 32 weights, the largest of its quantized types: where the file's own are not known."""
    return (ceil(rows * columns / 32) * 34,)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One stored format.

    Args:
        storage: bytes of the tensors that hold a Linear's weight; None where they rest unquantized.
        scratch_bytes_per_weight: live while a Linear's weight is expanded, per weight, besides the weight expanded.
        least_capability: CUDA compute capability that the format's compute dtype needs; None for any.
        weight_error: relative error of a Linear's result with Gaussian weights, which for storage formats is that of
            the weights (``figures`` has more): the planner's order of formats. Pictures of tiny models order nothing.
        provenance: where ``weight_error`` is from.
        compute_class: class of the matmuls of Linears; "" for the compute dtype's own.
        storage_of: format whose prepared store serves this one too; "" for none but its own.
        scratch_bytes: at most live besides, whatever the Linear's size.
    """

    name: str
    storage: Storage | None
    scratch_bytes_per_weight: float
    least_capability: tuple[int, int] | None
    weight_error: float
    provenance: str
    compute_class: str = ""
    storage_of: str = ""
    scratch_bytes: int = 0

    @property
    def stored_as(self) -> str:
        """Name of the format in the prepared store."""
        return self.storage_of or self.name

    @property
    def figures(self) -> FidelityFigures | None:
        """All that is measured of it; None where it is not quantized."""
        return FIGURES.get(self.name)

    @property
    def is_quantized(self) -> bool:
        return self.storage is not None

    @property
    def is_prepared(self) -> bool:
        """Whether it is made here, once, into the store: all quantized formats but the checkpoint's own."""
        return self.is_quantized and self.name != GGUF

    @property
    def bytes_per_weight(self) -> float:
        """Of a large square Linear in a 16-bit compute dtype, scales included."""
        side = 6144
        held = (side * side * self._plain_size(2),) if self.storage is None else self.storage(side, side, 2)
        return sum(held) / side**2

    def block_bytes(self, block: BlockSpec, dtype_bytes: int = 2) -> int:
        """Bytes of one block's span: each tensor rounded up to ``ALIGNMENT_BYTES``, the span to ``SECTOR_BYTES``.

        That padding is at most 0.02 % of a full-size block: most tensors have such sizes anyway, but for nf4's three
        small ones a Linear.
        """
        return _block_bytes(self, block, dtype_bytes)

    def transient_bytes(self, block: BlockSpec, dtype_bytes: int = 2) -> int:
        """Bytes live while the block's largest Linear runs, besides its stored weight: the weight in the compute dtype,
        and what expanding it takes; or the pieces of an integer matmul."""
        if self.storage is None:
            return 0
        if self.compute_class:
            return _aligned(max(self.pieces_bytes(rows, columns, INT8_TOKENS) for rows, columns in block.linears))
        largest = max(rows * columns for rows, columns in block.linears)
        return _aligned(ceil(largest * (dtype_bytes + self.scratch_bytes_per_weight)) + self.scratch_bytes)

    def pieces_bytes(self, rows: int, columns: int, tokens: float) -> int:
        """Live at most in the integer matmul of a (rows, columns) weight, beside its input and output; else 0.

        First the piece's input, divided by its scales in fp32, and rounded to int8; then that, the products in int32
        and once more in fp32.
        """
        if not self.compute_class:
            return 0
        piece = min(tokens, INT8_TOKENS)
        return ceil(piece * columns + max(4 * piece * columns, 8 * piece * min(rows, INT8_ROWS)))

    def plain_bytes(self, weights: int, dtype_bytes: int = 2) -> int:
        """Bytes of weights that are not quantized, ``PADDING_BESIDE_BLOCKS_BYTES`` a stage not counted."""
        return _aligned(weights * self._plain_size(dtype_bytes))

    def _plain_size(self, dtype_bytes: int) -> int:
        """Unquantized formats rest as what they are, in the others everything else rests in the compute dtype."""
        return DTYPE_BYTES.get(self.name, dtype_bytes)


@lru_cache(maxsize=256)  # the planner asks for a few sizes thousands of times
def _block_bytes(fmt: WeightFormat, block: BlockSpec, dtype_bytes: int) -> int:
    plain = fmt._plain_size(dtype_bytes)
    total = sum(_aligned(size * plain) for size in block.others)
    packed = block.packed if fmt.name == GGUF else ()
    for at, (rows, columns) in enumerate(block.linears):
        if packed:
            total += _aligned(packed[at] or rows * columns * plain)
            continue
        if fmt.name == MIXED and block.bits:
            total += sum(_aligned(size) for size in mixed_storage(rows, columns, block.bits[at]))
            continue
        held = fmt.storage(rows, columns, dtype_bytes) if fmt.storage is not None else (rows * columns * plain,)
        total += sum(_aligned(size) for size in held)
    return _aligned(total, SECTOR_BYTES)


def _aligned(size_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return -(-size_bytes // alignment) * alignment


COMPUTE_DTYPES = ("bf16", "fp16", "fp32")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PLAIN_FORMATS = ("fp32", "fp16", "bf16")
"""Unquantized: these rest in the compute dtype."""

GGUF = "gguf"
"""The blocks of a GGUF file as they are in it, whatever their types: of no other checkpoint."""
GGUF_PIECE_WEIGHTS = 1 << 22
"""Of a GGUF weight, expanded at a time."""
GGUF_SCRATCH_BYTES = 12
"""Live per weight of a piece while it is expanded: 8.1 (Q8_0) to 11.5 (Q6_K), measured on a CPU with torch's profiler
(tests), not on a GPU."""

MIXED = "nf4-mixed"
"""nf4's bytes or less, more faithful: 3, 4 or 5 bits a weight by what its Linear is (`planning.mixed`)."""
MIXED_PIECE_WEIGHTS = 1 << 20
"""Of a weight in 3 or 5 bits, expanded at a time."""
MIXED_SCRATCH_BYTES = 9
"""Live per weight of a piece while it is expanded, measured on a CPU with torch's profiler (tests), not on a GPU."""

_EXACT = "exact: the checkpoint's own bf16 values"
_OWN = "exact: the checkpoint's own quantized values"
_FP16 = "assumed: fp16 keeps more digits than bf16, but values beyond its range are clipped or lost"
_MEASURED = f"relative error of a Linear's result, Gaussian weights: {WEIGHT_ERRORS}; not an error of latents"

_UNMEASURED = 1.0
"""Of a new format, until its figures are written: the last to be chosen."""


def _quantized(
    name: str,
    storage: Storage,
    scratch_bytes_per_weight: float = 0,
    least_capability: tuple[int, int] | None = None,
    compute_class: str = "",
    storage_of: str = "",
    scratch_bytes: int = 0,
) -> WeightFormat:
    error = FIGURES[name].gaussian if name in FIGURES else _UNMEASURED
    return WeightFormat(
        name,
        storage,
        scratch_bytes_per_weight,
        least_capability,
        error,
        _MEASURED,
        compute_class,
        storage_of,
        scratch_bytes,
    )


# Scratch: int4 and int6 unpack one half of their low bits at a time (0.5 bytes a weight); nf4 expands its absmax values
# to fp32, twice for a moment (2 * 4/64). Measured on a CPU with torch's profiler (tests), not on a GPU.
FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat("fp32", None, 0, None, 0.0, _EXACT),
        WeightFormat("bf16", None, 0, (8, 0), 0.0, _EXACT),
        WeightFormat("fp16", None, 0, None, 0.0002, _FP16),
        _quantized("int8", _int8),
        _quantized("w8a8", _int8, least_capability=(7, 5), compute_class="int8", storage_of="int8"),
        _quantized("int6", _int6, 0.5),
        _quantized("fp8", _fp8),
        _quantized("nf4", _nf4, 8 / NF4_BLOCK),
        _quantized(MIXED, _nf4, 8 / NF4_BLOCK, scratch_bytes=MIXED_PIECE_WEIGHTS * MIXED_SCRATCH_BYTES),
        _quantized("int4", _int4, 0.5),
        WeightFormat(GGUF, _gguf, 0, None, 0.0, _OWN, scratch_bytes=GGUF_PIECE_WEIGHTS * GGUF_SCRATCH_BYTES),
    )
}
