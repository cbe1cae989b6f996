"""``--max-vram`` is a hard cap: the allocator refuses what lies beyond it."""

from __future__ import annotations

import pytest
import torch

from lowmem_flux2.runtime.device import cap_vram, measure

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
GIB, MIB = 1 << 30, 1 << 20
CONTEXT_BYTES = 512 * MIB


def test_what_lies_beyond_the_cap_is_refused() -> None:
    cap_vram(CUDA, 2 * GIB + CONTEXT_BYTES, CONTEXT_BYTES)
    held = torch.empty(GIB, dtype=torch.uint8, device=CUDA)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(GIB + 64 * MIB, dtype=torch.uint8, device=CUDA)
    more = torch.empty(GIB - 64 * MIB, dtype=torch.uint8, device=CUDA)  # and what is within it is not
    del held, more


def test_a_later_cap_replaces_an_earlier_one() -> None:
    cap_vram(CUDA, GIB, CONTEXT_BYTES)
    cap_vram(CUDA, 4 * GIB, CONTEXT_BYTES)
    assert len(torch.empty(2 * GIB, dtype=torch.uint8, device=CUDA)) == 2 * GIB


def test_the_meter_sees_the_peak_and_the_context() -> None:
    torch.cuda.empty_cache()
    with measure(CUDA, CONTEXT_BYTES) as taken:
        held = torch.empty(GIB, dtype=torch.uint8, device=CUDA)
        del held
    assert GIB <= taken.peak_allocated_bytes < GIB + 64 * MIB
    assert taken.peak_vram_bytes >= GIB + CONTEXT_BYTES
    assert taken.driver_used_bytes >= GIB
