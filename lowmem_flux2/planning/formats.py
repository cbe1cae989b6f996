"""The weight formats: bytes with scales, compute class, transient, least GPU, and what each costs in fidelity.

The *stored* format is not the compute dtype: int8 and nf4 here are storage; a Linear's weight is expanded to the
compute dtype for its matmul (the transient) and dropped again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_flux2.planning.models import BlockSpec

ALIGNMENT_BYTES = 256
"""Every stored tensor starts at a multiple of this: Linear kernels round differently at other alignments."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """One stored format.

    Args:
        linear_bytes_per_weight: of a quantizable Linear weight, scales included.
        other_bytes_per_weight: of what is never quantized (norm scales, embedders, modulation, output projection:
            together under 2.5 % of the weights, and they dominate the end-to-end error when quantized).
        transient_per_weight_bytes: live while one Linear runs, per weight of that Linear, besides the stored bytes.
        least_capability: CUDA compute capability that the format's compute dtype needs; None for any.
        weight_error: relative error of Gaussian weights; the planner's order until latents are measured.
        provenance: where ``weight_error`` is from.
    """

    name: str
    linear_bytes_per_weight: float
    other_bytes_per_weight: float
    transient_per_weight_bytes: float
    least_capability: tuple[int, int] | None
    weight_error: float
    provenance: str

    @property
    def is_quantized(self) -> bool:
        return self.name not in PLAIN_FORMATS

    def block_bytes(self, block: BlockSpec) -> int:
        """Stored bytes of one block, scales included (alignment padding is under 0.01 % at full size)."""
        linear = block.linear_weights * self.linear_bytes_per_weight
        return _aligned(linear + block.other_weights * self.other_bytes_per_weight)

    def transient_bytes(self, block: BlockSpec) -> int:
        """Bytes live while the block's largest Linear runs, besides its stored weight."""
        return _aligned(block.largest_linear_weights * self.transient_per_weight_bytes)

    def plain_bytes(self, weights: int) -> int:
        """Stored bytes of weights that are never quantized."""
        return _aligned(weights * self.other_bytes_per_weight)


def _aligned(size_bytes: float) -> int:
    return -int(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


PLAIN_FORMATS = ("fp32", "fp16", "bf16")
"""Unquantized: these rest in the compute dtype."""

_EXACT = "exact: the checkpoint's own bf16 values"
_FP16 = "assumed: fp16 keeps more digits than bf16, but values beyond its range are clipped or lost"
_WEIGHT_TABLE = "relative weight error on Gaussian weights, measured 2026 on CPU; not yet an error of latents"

# int8: one bf16 scale per output row. fp8: cast, no scales. nf4: fp32 absmax per 64 weights, itself quantized to 8 bits
# in groups of 256 (bitsandbytes double quantization: 1/64 + 4/(64*256) bytes). int4: bf16 scale and shift per 128.
# Transients, counted in runtime/quantize.py for a 16-bit compute dtype: the expanded weight (2 bytes), for int4 one
# unpacked half (0.5), for nf4 its absmax in fp32 (4/64). Not measured on a GPU.
FORMATS: dict[str, WeightFormat] = {
    fmt.name: fmt
    for fmt in (
        WeightFormat("fp32", 4, 4, 0, None, 0.0, _EXACT),
        WeightFormat("bf16", 2, 2, 0, (8, 0), 0.0, _EXACT),
        WeightFormat("fp16", 2, 2, 0, None, 0.0002, _FP16),
        WeightFormat("int8", 1 + 2 / 4096, 2, 2.0, None, 0.008, _WEIGHT_TABLE),
        WeightFormat("fp8", 1, 2, 2.0, None, 0.033, _WEIGHT_TABLE),
        WeightFormat("nf4", 0.5 + 1 / 64 + 4 / (64 * 256), 2, 2.1, None, 0.092, _WEIGHT_TABLE),
        WeightFormat("int4", 0.5 + 4 / 128, 2, 2.5, None, 0.100, _WEIGHT_TABLE),
    )
}

COMPUTE_DTYPES = ("bf16", "fp16", "fp32")
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
