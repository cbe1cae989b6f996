"""What expanding stored weights takes, each time that a Linear runs: memory traffic, as operators read and write it.

Each use of a quantized Linear expands its weight to the compute dtype by itself (``runtime.quantize``), so a block is
expanded once for each batch, guidance pass and chunk of tokens that goes through it. It is memory traffic: elementwise
operators of a few FLOPs a weight. The bytes below are those of the operators' inputs and outputs (a test counts them as
``dequantize`` runs), the rate is the format's own where calibration measured it, else the memory's. w8a8 expands
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowmem_flux2.planning.formats import GGUF, MIXED, WeightFormat
from lowmem_flux2.planning.hardware import Hardware

TRAFFIC: Mapping[str, tuple[float, float]] = {
    "int8": (1.0, 3.0),
    "fp8": (1.0, 1.0),
    "nf4": (0.77, 1.0),
    MIXED: (0.77, 1.0),
    "int4": (3.03, 5.0),
    "int6": (8.03, 7.0),
    GGUF: (21.6, 1.0),
}
"""Of a weight: bytes whatever the compute dtype, and how often its value in the compute dtype is read or written.

int8: the cast reads 1 and writes a value, the scale reads and writes it. int4: each half of the low bits is read,
masked, written, read and spread (1.5 each), then scaled and shifted. int6: so are its low bits, and four times its high
ones (1.25 each), added in place. nf4: one kernel; 0.27 is of its nested absmax. nf4-mixed:
as nf4, but for what ``PLANES_BYTES`` says. GGUF: that of Q4_K, whose pieces go
through fp32; others take 9 (Q8_0) to 46 (Q5_1).
"""


PLANES_BYTES = 44.2
"""More, of a weight in 3 or 5 bits (43.8 to 45.0): planes taken apart, its level is looked up, in pieces."""


def expanded_bytes(fmt: WeightFormat, dtype_bytes: int, weights: float, planes: float = 0.0) -> float:
    """Read and written to expand so many weights of Linears once; 0 for formats that expand nothing.

    Args:
        planes: the share of them that lies in planes of bits.
    """
    if not fmt.is_quantized or fmt.compute_class:
        return 0.0
    fixed, values = TRAFFIC[fmt.name]
    return weights * (fixed + values * dtype_bytes + planes * PLANES_BYTES)


def expand_rate(hardware: Hardware, name: str) -> float:
    """Bytes of ``expanded_bytes`` a second of a format."""
    return hardware.expand_bytes_per_s.get(name, hardware.memory_bytes_per_s)


def expand_seconds(
    hardware: Hardware, fmt: WeightFormat, dtype_bytes: int, weights: float, planes: float = 0.0
) -> float:
    """To expand so many weights of Linears once, ``planes`` as in ``expanded_bytes``."""
    return expanded_bytes(fmt, dtype_bytes, weights, planes) / expand_rate(hardware, fmt.name)


def reading_seconds(hardware: Hardware, dtype_bytes: int, weights: float) -> float:
    """A matmul of few tokens waits for its weights: these, read once."""
    return weights * dtype_bytes / hardware.memory_bytes_per_s
