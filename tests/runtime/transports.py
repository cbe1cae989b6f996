"""Transports on an adversarial machine: a plain one, CudaTransport over a stand-in for torch.cuda, and a CPU's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adversary import COPIES, KERNELS, POISON, Machine, Worker
from torch.overrides import TorchFunctionMode

from lowmem_flux2.runtime.transport import CudaTransport, HostTransport, Transport

DEVICE = torch.device("cuda", 1)
KINDS = ("deferred", "cuda", "host")


class DeferredTransport:
    """Each primitive as the interface defines it. ``can_pin`` False: the system refuses to page-lock memory."""

    is_asynchronous = True

    def __init__(self, machine: Machine, can_pin: bool) -> None:
        self._machine = machine
        self._can_pin = can_pin

    def worker(self) -> Executor:
        return Worker(self._machine)

    def event(self) -> int:
        return self._machine.event()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._machine.copy(source, target)

    def record_copy(self, event: int) -> None:
        self._machine.record(COPIES, event)

    def record_compute(self, event: int) -> None:
        self._machine.record(KERNELS, event)

    def copy_waits(self, event: int) -> None:
        self._machine.wait(COPIES, event)

    def compute_waits(self, event: int) -> None:
        self._machine.wait(KERNELS, event)

    def host_waits(self, event: int) -> None:
        self._machine.host_waits(event)

    def synchronize(self) -> None:
        self._machine.synchronize()

    def pin(self, span: torch.Tensor) -> str | None:
        if not self._can_pin:
            return "no"
        self._machine.pin(span)
        return None

    def unpin(self, span: torch.Tensor) -> None:
        self._machine.unpin(span)


class PausingHostTransport(HostTransport):
    """``device=cpu``, whose copies take their time."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def worker(self) -> Executor:
        return Worker(self._machine)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._machine.copied.append(source)
        self._machine.loop_has_waited |= self._machine.is_loop()
        target.fill_(POISON)
        self._machine.pause()
        super().copy(source, target)


class PausingCudaTransport(CudaTransport):
    """The real one but for its thread; to be used inside ``torch_cuda``."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(DEVICE)
        self._machine = machine

    def worker(self) -> Executor:
        return Worker(self._machine, self.enter_thread)


class _Stream:
    def __init__(self, machine: Machine, queue: str) -> None:
        self._machine = machine
        self.queue = queue

    def wait_event(self, event: _Event) -> None:
        self._machine.wait(self.queue, event.number)


class _Event:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.number = machine.event()

    def record(self, stream: _Stream) -> None:
        self._machine.record(stream.queue, self.number)

    def synchronize(self) -> None:
        self._machine.host_waits(self.number)


class _OnStream(TorchFunctionMode):
    """``with torch.cuda.stream(...)``: copies go to its queue; those that say they block do."""

    def __init__(self, machine: Machine, stream: _Stream, has_entered: set[int]) -> None:
        super().__init__()
        self._machine, self._stream = machine, stream
        if threading.get_ident() not in has_entered:
            machine.faults.append("a thread used cuda:1 while its current device was cuda:0")

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.Tensor.copy_:
            return function(*args, **(kwargs or {}))
        target, source = args
        self._machine.copy(source, target, self._stream.queue)
        if not (kwargs or {}).get("non_blocking"):
            self._machine.synchronize()
            self._machine.loop_has_waited |= self._machine.is_loop()
        return target


@contextmanager
def torch_cuda(machine: Machine, can_pin: bool = True) -> Iterator[None]:
    """The names of torch.cuda that CudaTransport uses, on the machine. The calling thread's device is current."""
    copies, compute = _Stream(machine, COPIES), _Stream(machine, KERNELS)
    has_entered = {threading.get_ident()}

    def set_device(device: torch.device) -> None:
        assert device == DEVICE
        has_entered.add(threading.get_ident())

    def register(span: torch.Tensor, device: torch.device) -> str | None:
        return DeferredTransport(machine, can_pin).pin(span)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.Stream", lambda device: copies)
        patch.setattr("torch.cuda.Event", lambda blocking: _Event(machine))
        patch.setattr("torch.cuda.current_stream", lambda device: compute)
        patch.setattr("torch.cuda.stream", lambda stream: _OnStream(machine, stream, has_entered))
        patch.setattr("torch.cuda.set_device", set_device)
        patch.setattr("torch.cuda.synchronize", lambda device: machine.synchronize())
        patch.setattr("lowmem_flux2.runtime.transport.register_pinned", register)
        patch.setattr("lowmem_flux2.runtime.transport.unregister_pinned", machine.unpin)
        yield


@contextmanager
def transport_on(machine: Machine, kind: str, can_pin: bool = True) -> Iterator[Transport]:
    if kind == "deferred":
        yield DeferredTransport(machine, can_pin)
    elif kind == "host":
        yield PausingHostTransport(machine)
    else:
        with torch_cuda(machine, can_pin):
            yield PausingCudaTransport(machine)
