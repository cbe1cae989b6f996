"""What the streamer asks of a device: copies on one queue, kernels on another, events between them.

A transport has primitive operations only. In which order they are issued is the streamer's business, so that tests can
run its logic against a transport whose queues advance in any order the events allow, and benchmarks can count or time
by overriding one method.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

import torch

from lowmem_flux2.runtime.device import register_pinned, synchronize, unregister_pinned


class Transport(Protocol):
    """Two queues, the copy stream and the compute stream, and events by number.

    Waiting for an event means its latest recording; an event that was never recorded holds nobody up, as in CUDA.
    Every method may be called from the loop's thread and from the streamer's worker.
    """

    @property
    def is_asynchronous(self) -> bool:
        """Whether ``copy`` returns before the bytes are there.

        Then the loop's thread enqueues copies of pinned blocks itself, and blocks on disk pass through a staging ring.
        """
        ...

    def worker(self) -> Executor:
        """One thread that does what it is given in order: reads, and copies for which its caller would have to wait."""
        ...

    def event(self) -> int:
        """A new event, not recorded yet."""
        ...

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue on the copy stream: a host span into a span of a slot, both uint8 and of one length."""
        ...

    def record_copy(self, event: int) -> None:
        """The event is reached when all copies enqueued so far are done."""
        ...

    def record_compute(self, event: int) -> None:
        """The event is reached when all kernels enqueued so far are done."""
        ...

    def copy_waits(self, event: int) -> None:
        """Copies enqueued from now on start after the event."""
        ...

    def compute_waits(self, event: int) -> None:
        """Kernels enqueued from now on start after the event."""
        ...

    def host_waits(self, event: int) -> None:
        """Return after the event."""
        ...

    def synchronize(self) -> None:
        """Return when both queues are empty."""
        ...

    def pin(self, span: torch.Tensor) -> str | None:
        """Page-lock host memory where it is; None, or what speaks against it."""
        ...

    def unpin(self, span: torch.Tensor) -> None: ...


def transport_for(device: torch.device) -> Transport:
    return CudaTransport(device) if device.type == "cuda" else HostTransport()


class HostTransport:
    """``device=cpu``: a copy is done when ``copy`` returns, on the worker; its future is all the order needed."""

    is_asynchronous = False

    def worker(self) -> Executor:
        return ThreadPoolExecutor(1, "block-reader")

    def event(self) -> int:
        return 0

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def record_copy(self, event: int) -> None:
        return

    def record_compute(self, event: int) -> None:
        return

    def copy_waits(self, event: int) -> None:
        return

    def compute_waits(self, event: int) -> None:
        return

    def host_waits(self, event: int) -> None:
        return

    def synchronize(self) -> None:
        return

    def pin(self, span: torch.Tensor) -> str | None:
        return "host memory needs no pinning for the CPU"

    def unpin(self, span: torch.Tensor) -> None:
        return


class CudaTransport:
    """A copy stream of its own beside the stream that is current on the calling thread, which is the compute stream."""

    is_asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._events: list[torch.cuda.Event] = []

    def worker(self) -> Executor:
        return ThreadPoolExecutor(1, "block-reader", self.enter_thread)

    def enter_thread(self) -> None:
        """On a new thread: the current device is each thread's own.

        Left at cuda:0, the thread would make a context there as soon as ``torch.cuda.stream`` puts the old device back.
        """
        torch.cuda.set_device(self._device)

    def event(self) -> int:
        self._events.append(torch.cuda.Event(blocking=True))  # a waiting worker sleeps instead of spinning
        return len(self._events) - 1

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def record_copy(self, event: int) -> None:
        self._events[event].record(self._copies)

    def record_compute(self, event: int) -> None:
        self._events[event].record(torch.cuda.current_stream(self._device))

    def copy_waits(self, event: int) -> None:
        self._copies.wait_event(self._events[event])

    def compute_waits(self, event: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._events[event])

    def host_waits(self, event: int) -> None:
        self._events[event].synchronize()

    def synchronize(self) -> None:
        synchronize(self._device)

    def pin(self, span: torch.Tensor) -> str | None:
        return register_pinned(span, self._device)

    def unpin(self, span: torch.Tensor) -> None:
        unregister_pinned(span)
