"""CudaTransport orders what it is told to order, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowmem_flux2.runtime.device import register_pinned, unregister_pinned
from lowmem_flux2.runtime.layout import allocate
from lowmem_flux2.runtime.transport import CudaTransport, transport_for

pytestmark = pytest.mark.gpu

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SLOW_CYCLES = 200_000_000
"""A tenth of a second at 2 GHz: far longer than the host takes to enqueue everything else."""
COPY_BYTES = 1 << 30
"""Takes 20 ms and more over any link there is."""


@pytest.fixture
def transport() -> CudaTransport:
    made = transport_for(CUDA)
    assert isinstance(made, CudaTransport)
    return made


@pytest.fixture(scope="module")
def pinned() -> Iterator[torch.Tensor]:
    """A gibibyte of ones, registered as the arenas are."""
    span = allocate(COPY_BYTES, CPU)
    assert register_pinned(span, CUDA) is None
    span.fill_(1)
    yield span
    torch.cuda.synchronize()
    unregister_pinned(span)


@pytest.mark.parametrize("waits", [True, False])
def test_a_copy_waits_for_the_kernels_that_use_its_slot(
    waits: bool, transport: CudaTransport, pinned: torch.Tensor
) -> None:
    slot = torch.zeros(1 << 20, dtype=torch.uint8, device=CUDA)
    used = slot.clone()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    freed = transport.event()
    torch.cuda._sleep(SLOW_CYCLES)
    used.copy_(slot)
    transport.record_compute(freed)
    if waits:
        transport.copy_waits(freed)
    transport.copy(pinned[: len(slot)], slot)
    transport.synchronize()
    assert int(used.max()) == (0 if waits else 1)  # without the wait the slot is overwritten under the kernel


@pytest.mark.parametrize("waits", [True, False])
def test_kernels_wait_for_the_copy_that_they_need(waits: bool, transport: CudaTransport, pinned: torch.Tensor) -> None:
    slot = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=CUDA)
    seen = torch.empty(1, dtype=torch.uint8, device=CUDA)
    seen.copy_(slot[-1:])  # the first use of a kernel loads it, which takes its time
    torch.cuda.synchronize()
    copied = transport.event()
    transport.copy(pinned, slot)
    transport.record_copy(copied)
    if waits:
        transport.compute_waits(copied)
    seen.copy_(slot[-1:])
    transport.synchronize()
    assert int(seen) == (1 if waits else 0)


def test_the_host_goes_on_while_copies_of_pinned_memory_run(transport: CudaTransport, pinned: torch.Tensor) -> None:
    slot = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=CUDA)
    torch.cuda.synchronize()
    copied = transport.event()
    transport.copy(pinned, slot)
    transport.record_copy(copied)
    assert not transport._events[copied].query()
    transport.host_waits(copied)
    assert transport._events[copied].query()
    assert int(slot[-1]) == 1


def test_a_wait_for_an_event_that_was_never_recorded_holds_nobody_up(transport: CudaTransport) -> None:
    event = transport.event()
    transport.copy_waits(event)
    transport.compute_waits(event)
    transport.host_waits(event)
    transport.synchronize()


def test_the_worker_works_on_the_transports_device(transport: CudaTransport) -> None:
    worker = transport.worker()
    assert worker.submit(torch.cuda.current_device).result() == torch.cuda.current_device()
    worker.shutdown()
