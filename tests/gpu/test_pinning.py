"""Host memory is page-locked where it is; where it cannot be, the run goes on and says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.device import register_pinned, unregister_pinned
from lowmem_flux2.runtime.layout import Layout, allocate, layout_of
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.transport import CudaTransport

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIDE, COUNT, ROUNDS = 1024, 5, 3


class Numbered:
    """A block whose weights are all its number."""

    def __init__(self, number: int, layout: Layout) -> None:
        self.number, self.layout = number, layout

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        for place in self.layout.places:
            place.view(span).fill_(self.number)


class Unpinnable(CudaTransport):
    """Registers nothing: a second registration of the same memory is refused, as a limit is."""

    def pin(self, span: torch.Tensor) -> str | None:
        assert register_pinned(span, CUDA) is None
        failure = register_pinned(span, CUDA)
        unregister_pinned(span)
        return failure


def test_registered_memory_is_pinned_until_it_is_given_back() -> None:
    span = allocate(64 << 20, CPU)
    assert register_pinned(span, CUDA) is None
    assert span.is_pinned()
    span.fill_(7)
    assert int(span.to(CUDA, non_blocking=True).min()) == 7
    torch.cuda.synchronize()
    unregister_pinned(span)
    assert not span.is_pinned()


def test_a_refusal_is_told_and_leaves_no_error_behind() -> None:
    span = allocate(1 << 20, CPU)
    assert register_pinned(span, CUDA) is None
    failure = register_pinned(span, CUDA)
    assert failure is not None
    assert "CUDA error" in failure
    assert float(torch.ones(8, device=CUDA).sum()) == 8  # the next kernel is not blamed
    torch.cuda.synchronize()
    unregister_pinned(span)


@pytest.mark.parametrize("transport", [CudaTransport, Unpinnable])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("placement", [Placement.PINNED, Placement.PAGEABLE, Placement.DISK])
def test_blocks_are_right_with_and_without_pinning(
    transport: type[CudaTransport], slots: int, placement: Placement
) -> None:
    blocks = [nn.Linear(SIDE, SIDE, bias=False, device="meta") for _ in range(COUNT)]
    sources = [Numbered(number, layout_of(block, "", torch.float32)) for number, block in enumerate(blocks)]
    told: list[str] = []
    streamer = BlockStreamer(
        blocks, sources, [placement] * COUNT, CUDA, slots, ROUNDS, warn=told.append, transport=transport(CUDA)
    )
    extremes = []
    for _ in range(ROUNDS):
        for block in streamer.round():
            torch.cuda._sleep(2_000_000)  # kernels lag behind the host, so that a missing wait is seen
            extremes.append(torch.stack([block.weight.min(), block.weight.max()]))
    found = torch.stack(extremes).to("cpu")
    expected = torch.arange(COUNT, dtype=torch.float32).repeat(ROUNDS)
    assert torch.equal(found, torch.stack([expected, expected], dim=1))
    streamer.close()
    is_refused = transport is Unpinnable and placement is not Placement.PAGEABLE
    assert len(told) == is_refused  # one warning, however many spans
    assert all("could not pin" in line for line in told)
