"""How long the device computes a block of the transformer in one step: matmuls, attention and weights' expansion."""

from __future__ import annotations

from lowmem_flux2.planning.chunks import chunk_bounds
from lowmem_flux2.planning.expansion import expand_seconds
from lowmem_flux2.planning.flops import CHUNK_OVERHEADS, block_flops, compute_seconds
from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS, MIXED
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.mixed import planes_shares
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.timeline import nanoseconds
from lowmem_flux2.planning.workload import Workload


def block_times(
    stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware, is_first: bool = False
) -> tuple[tuple[int, int], tuple[float, float]]:
    """Nanoseconds of a (double-stream, single-stream) block in all guidance passes of one step; of these, the seconds
    that expand weights.

    Args:
        is_first: the step is its batch's first one, which also computes references that are kept.
    """
    fmt, dtype_bytes, passes = FORMATS[stage.weight_format], DTYPE_BYTES[stage.compute_dtype], workload.guidance_passes
    tokens = workload.sequence_tokens if is_first else workload.step_tokens
    chunks = tokens // stage.chunk_tokens if stage.chunk_tokens else 1
    launches_s = CHUNK_OVERHEADS * hardware.block_overhead_s * max(chunks - 1, 0)
    shares = planes_shares(model.transformer) if fmt.name == MIXED else (0.0, 0.0)
    double_s, single_s = (
        passes * expand_seconds(hardware, fmt, dtype_bytes, weights, planes)
        for weights, planes in zip(_expanded(stage, model, workload.text_tokens, tokens), shares, strict=True)
    )
    double, single, attention = block_flops(model, workload, stage.batch_size, is_first)
    double_ns, single_ns = (
        nanoseconds(
            passes * (compute_seconds(hardware, stage.compute_dtype, linear, attention, fmt) + launches_s) + expanding,
            1,
        )
        for linear, expanding in ((double, double_s), (single, single_s))
    )
    return (double_ns, single_ns), (double_s, single_s)


def _expanded(stage: StagePlan, model: ModelSpec, text: int, tokens: int) -> tuple[float, float]:
    """Weights that one pass expands in a (double-stream, single-stream) block: each Linear's, once a chunk.

    Half of a double-stream block's Linears see the chunks of text, half those of the image.
    """
    dims = model.transformer
    texts, images, both = (len(chunk_bounds(count, stage.chunk_tokens)) for count in (text, tokens - text, tokens))
    double, single = dims.double_block.linear_weights, dims.single_block.linear_weights
    return double * (texts + images) / 2, float(single * both)
