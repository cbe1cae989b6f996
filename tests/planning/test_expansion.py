"""Expanding weights: its traffic is what the operators read and write, and it grows with every use of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from machines import DEV, KLEIN_4B, KLEIN_BASE, machine, spec, work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.expansion import TRAFFIC, expand_rate, expanded_bytes
from lowmem_flux2.planning.formats import FORMATS, GGUF, MIXED
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.runtime.measurements import GGUF_KIND
from lowmem_flux2.runtime.packed import LINEARS
from lowmem_flux2.runtime.quantize import MIXED_LINEARS, STORED


class _Traffic(TorchDispatchMode):
    """Bytes of all operators' inputs and outputs; views, and allocations that nothing is written to, have none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read, written = (
            [leaf for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (args, made)
        )
        given = {tensor.untyped_storage()._cdata for tensor in read}
        is_view = not name.endswith("_") and all(tensor.untyped_storage()._cdata in given for tensor in written)
        if not (name.startswith("empty") or is_view):
            read = read[1:] if name == "copy_" else read
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in [*read, *written])
        return made


@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.bfloat16, 2), (torch.float32, 4)])
@pytest.mark.parametrize(("name", "bits"), [*((name, 4) for name in TRAFFIC), (MIXED, 3), (MIXED, 5)])
def test_traffic_is_what_the_operators_read_and_write(
    name: str, bits: int, dtype: torch.dtype, dtype_bytes: int
) -> None:
    rows, columns = 64, 3072
    with torch.device("meta"):
        linear = torch.nn.Linear(columns, rows, bias=False)
    kinds = STORED | {GGUF: LINEARS[GGUF_KIND], MIXED: MIXED_LINEARS[bits]}
    stored = kinds[name](linear, dtype)
    for key, buffer in list(stored.named_buffers()):
        setattr(stored, key, torch.zeros(buffer.shape, dtype=buffer.dtype))
    with _Traffic() as traffic:
        stored.dequantize()
    assert expanded_bytes(FORMATS[name], dtype_bytes, rows * columns, float(bits != 4)) == pytest.approx(
        traffic.bytes, rel=0.01
    )


def test_every_format_that_expands_has_its_traffic() -> None:
    assert set(TRAFFIC) == {fmt.name for fmt in FORMATS.values() if fmt.is_quantized and not fmt.compute_class}


def _denoised(
    name: str, weight_format: str, chunk: int = 0, steps: int = 4, profile: str = "rtx-3060-12gb"
) -> StageCost:
    model = spec(name)
    blocks = len(model.transformer.blocks)
    stage = replace(
        StagePlan.bare("denoise", weight_format, "bf16"),
        block_placements=(Placement.PINNED,) * blocks,
        slots=2,
        prefetch_depth=1,
        chunk_tokens=chunk,
    )
    return stage_cost(stage, model, work(name, steps=steps), machine(profile))


def test_each_step_and_pass_and_chunk_expands_again() -> None:
    hardware, dims = machine("rtx-3060-12gb"), spec(KLEIN_4B).transformer
    once = expanded_bytes(FORMATS["int8"], 2, sum(block.linear_weights for block in dims.blocks))
    once_s = once / expand_rate(hardware, "int8")
    assert _denoised(KLEIN_4B, "int8", steps=4).expand_s == pytest.approx(4 * once_s, rel=1e-6)
    assert _denoised(KLEIN_BASE, "int8", steps=4).expand_s == pytest.approx(8 * once_s, rel=1e-6)
    assert _denoised(KLEIN_4B, "bf16").expand_s == _denoised(KLEIN_4B, "w8a8").expand_s == 0
    # 512 tokens of text are one chunk of 2048, 4096 of the image two, 4608 together two as well.
    doubles = dims.num_double * dims.double_block.linear_weights
    singles = dims.num_single * dims.single_block.linear_weights
    factor = (1.5 * doubles + 2 * singles) / (doubles + singles)
    assert _denoised(KLEIN_4B, "int8", 2048).expand_s == pytest.approx(4 * factor * once_s, rel=1e-6)


def test_what_is_expanded_adds_to_what_is_computed() -> None:
    hardware = machine("rtx-3060-12gb")
    plain, stored = _denoised(DEV, "bf16"), _denoised(DEV, "int8")
    assert stored.compute_s - plain.compute_s == pytest.approx(stored.expand_s, rel=1e-3)
    assert stored.expand_s < 0.1 * stored.compute_s
    assert expand_rate(hardware, "int8") == hardware.memory_bytes_per_s == pytest.approx(0.75 * 360e9)
    cpu = machine("cpu")
    assert expand_rate(cpu, "int8") == cpu.expand_bytes_per_s["int8"] < cpu.memory_bytes_per_s
