"""Bytes of the weight formats, and their table."""

from __future__ import annotations

import pytest
from machines import DEV, spec

from lowmem_flux2.planning.formats import ALIGNMENT_BYTES, COMPUTE_DTYPES, DTYPE_BYTES, FORMATS, PLAIN_FORMATS


def test_dev_blocks_have_the_bytes_of_the_design() -> None:
    dims = spec(DEV).transformer
    assert FORMATS["bf16"].block_bytes(dims.double_block) == pytest.approx(1.963e9, rel=1e-3)
    assert FORMATS["bf16"].block_bytes(dims.single_block) == pytest.approx(0.982e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("fp32", 32),
        ("bf16", 16),
        ("int8", 8),
        ("w8a8", 8),
        ("int6", 6.25),
        ("fp8", 8),
        ("nf4", 4.127),
        ("nf4-mixed", 4.127),
        ("int4", 4.25),
    ],
)
def test_a_format_takes_its_bits_per_weight(name: str, bits: float) -> None:
    block = spec(DEV).transformer.single_block
    assert FORMATS[name].block_bytes(block) * 8 / block.total_weights == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_are_whole_multiples_of_the_alignment(name: str) -> None:
    block = spec(DEV).transformer.double_block
    fmt = FORMATS[name]
    for size in (fmt.block_bytes(block), fmt.transient_bytes(block), fmt.plain_bytes(12345)):
        assert size % ALIGNMENT_BYTES == 0
    assert fmt.plain_bytes(0) == 0
    assert fmt.plain_bytes(1) == ALIGNMENT_BYTES


def test_transients_are_what_expanding_the_largest_weight_allocates() -> None:
    block = spec(DEV).transformer.single_block
    weights = max(rows * columns for rows, columns in block.linears)
    for name, per_weight in (("bf16", 0), ("int8", 2), ("fp8", 2), ("nf4", 2.125), ("int4", 2.5), ("int6", 2.5)):
        assert FORMATS[name].transient_bytes(block) == pytest.approx(per_weight * weights, rel=1e-3)
        of_fp32 = (per_weight + 2) * weights if FORMATS[name].is_quantized else 0
        assert FORMATS[name].transient_bytes(block, dtype_bytes=4) == pytest.approx(of_fp32, rel=1e-3)


def test_smaller_formats_are_less_faithful_and_every_error_says_where_it_is_from() -> None:
    quantized = [fmt for fmt in FORMATS.values() if fmt.is_quantized]
    assert [fmt.name for fmt in FORMATS.values() if not fmt.is_quantized] == sorted(
        PLAIN_FORMATS, key=list(FORMATS).index
    )
    assert all(fmt.weight_error > FORMATS["fp16"].weight_error for fmt in quantized if fmt.is_prepared)
    assert FORMATS["int8"].weight_error < FORMATS["nf4"].weight_error
    assert all(fmt.provenance and fmt.name == name for name, fmt in FORMATS.items())


def test_every_compute_dtype_has_a_size() -> None:
    assert set(DTYPE_BYTES) == set(COMPUTE_DTYPES) == set(PLAIN_FORMATS)
