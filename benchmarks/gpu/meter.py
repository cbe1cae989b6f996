"""A transport that also measures: bytes and seconds of copies, and how long compute stood still for them.

On CUDA a pair of timing events brackets every copy on the copy stream and every wait on the compute stream: the time
between the pair around a wait is what the compute stream waited. Where the loop's thread itself has to wait for the
worker (pageable and disk blocks, and all of ``device=cpu``), that is measured on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import torch

from lowmem_flux2.runtime.transport import CudaTransport, HostTransport, Transport


@dataclass(frozen=True, slots=True)
class Transfers:
    """What one streamer did since it had loaded. Bytes and seconds; 0 copies where nothing was streamed.

    Args:
        copy_s: time in which the copies ran, waits for a free slot apart.
        compute_waited_s: of the compute stream, for copies (0 on a CPU, which has none).
        host_waited_s: of the loop's thread, for the worker.
    """

    copies: int
    h2d_bytes: int
    copy_s: float
    compute_waited_s: float
    host_waited_s: float

    @property
    def bytes_per_s(self) -> float | None:
        return self.h2d_bytes / self.copy_s if self.copy_s else None


class _TimedFuture(Future[Any]):
    """A future whose ``result`` adds the time that its caller waited."""

    waited: Callable[[float], None]

    def result(self, timeout: float | None = None) -> Any:
        start = time.perf_counter()
        try:
            return super().result(timeout)
        finally:
            self.waited(time.perf_counter() - start)


class _TimedWorker(Executor):
    def __init__(self, inner: Executor, waited: Callable[[float], None]) -> None:
        self._inner, self._waited = inner, waited

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = self._inner.submit(function, *args, **kwargs)
        future.__class__ = _TimedFuture
        assert isinstance(future, _TimedFuture)
        future.waited = self._waited
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._inner.shutdown(wait=wait, cancel_futures=cancel_futures)


@dataclass(slots=True)
class _Counts:
    copies: int = 0
    h2d_bytes: int = 0
    copy_s: float = 0.0
    host_waited_s: float = 0.0
    copy_pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)
    wait_pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def waited(self, seconds: float) -> None:
        self.host_waited_s += seconds

    def transfers(self) -> Transfers:
        """Sum up; the device must be idle."""
        return Transfers(
            self.copies,
            self.h2d_bytes,
            self.copy_s + _seconds(self.copy_pairs),
            _seconds(self.wait_pairs),
            self.host_waited_s,
        )


def _seconds(pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> float:
    milliseconds: float = sum(first.elapsed_time(last) for first, last in pairs)
    return milliseconds / 1000


class MeteredCuda(CudaTransport):
    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.counts = _Counts()

    def worker(self) -> Executor:
        return _TimedWorker(super().worker(), lambda seconds: self.counts.waited(seconds))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(self._copies)
        super().copy(source, target)
        last.record(self._copies)
        self.counts.copy_pairs.append((first, last))
        self.counts.copies += 1
        self.counts.h2d_bytes += source.numel()

    def compute_waits(self, event: int) -> None:
        compute = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(compute)
        super().compute_waits(event)
        last.record(compute)
        self.counts.wait_pairs.append((first, last))


class MeteredHost(HostTransport):
    def __init__(self) -> None:
        self.counts = _Counts()

    def worker(self) -> Executor:
        return _TimedWorker(super().worker(), lambda seconds: self.counts.waited(seconds))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        start = time.perf_counter()
        super().copy(source, target)
        self.counts.copy_s += time.perf_counter() - start
        self.counts.copies += 1
        self.counts.h2d_bytes += source.numel()


class Meters:
    """Makes metered transports, and keeps one per stage for reading."""

    def __init__(self) -> None:
        self._of: dict[str, MeteredCuda | MeteredHost] = {}

    def transport(self, stage: str, device: torch.device) -> Transport:
        self._of[stage] = MeteredCuda(device) if device.type == "cuda" else MeteredHost()
        return self._of[stage]

    def restart(self, stage: str) -> None:
        """Forget what loading did."""
        if stage in self._of:
            self._of[stage].counts = _Counts()

    def transfers(self, stage: str) -> Transfers | None:
        """What the stage's last streamer did; None for a stage without one."""
        return self._of[stage].counts.transfers() if stage in self._of else None
