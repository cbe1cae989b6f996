"""Pinned memory: never more than may be, and one warning with a number where the system refuses."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import transformer_blocks
from lowmem_flux2.runtime.pinning import Pinning
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.transport import HostTransport

CPU = torch.device("cpu")
PLENTY = 1 << 40


class Card(HostTransport):
    """A device of its own, as the streamer sees it: copies go through pinned memory, which may be refused."""

    is_asynchronous = True

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.pinned: list[int] = []
        self.asked = 0

    def pin(self, span: torch.Tensor) -> str | None:
        self.asked += 1
        if self.refusal is None:
            self.pinned.append(span.numel())
        return self.refusal

    def unpin(self, span: torch.Tensor) -> None:
        self.pinned.remove(span.numel())


def stream(folder: Path, placement: Placement, card: Card, pinning: Pinning | None, told: list[str]) -> int:
    """Two rounds over the tiny transformer's blocks; the bytes that were pinned meanwhile."""
    with init_empty_weights(include_buffers=False):
        net = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder)).eval()
    blocks = transformer_blocks(net)
    with TensorFile(folder) as files:
        sources = blocks.sources(files, torch.float32)
        placements = [placement] * len(sources)
        streamer = BlockStreamer(blocks.modules, sources, placements, CPU, 2, 2, told.append, card, pinning)
        held = sum(card.pinned)
        for _ in range(2):
            assert len(list(streamer.round())) == len(sources)
        streamer.close()
    assert card.pinned == []
    return held


@pytest.mark.parametrize("placement", [Placement.PINNED, Placement.DISK])
def test_a_refusal_is_told_once_with_what_it_costs(placement: Placement, tiny_klein: Path) -> None:
    told: list[str] = []
    card = Card("CUDA error 2")
    assert stream(tiny_klein / "transformer", placement, card, Pinning(PLENTY, 25e9, 10e9), told) == 0
    (line,) = told
    assert "CUDA error 2" in line
    assert "planned at 10.0 GB/s in place of 25.0 GB/s, so 2.5 times slower" in line
    assert "ulimit -l" in line


@pytest.mark.parametrize("placement", [Placement.PINNED, Placement.DISK])
def test_no_more_is_pinned_than_may_be(placement: Placement, tiny_klein: Path) -> None:
    told: list[str] = []
    folder = tiny_klein / "transformer"
    whole = stream(folder, placement, Card(), Pinning(PLENTY, 25e9, 10e9), told)
    assert whole > 0
    assert stream(folder, placement, Card(), Pinning(whole, 25e9, 10e9), told) == whole
    short = stream(folder, placement, Card(), Pinning(whole - 1, 25e9, 10e9), told)
    assert short < whole
    none = Card()
    assert stream(folder, placement, none, Pinning(0, 25e9, 10e9), told) == 0
    assert none.asked == 0
    assert told == []  # the plan knows it


# ------------------------------------------------------------------------------------------------- RLIMIT_MEMLOCK

IPC_LOCK = 14
"""CAP_IPC_LOCK (linux/capability.h): who has it passes over the limit."""


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


@contextmanager
def memlock(limit_bytes: int) -> Iterator[None]:
    """At most this limit for this process, and for this thread no right to pass over it."""
    libc, header = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()  # two of effective, permitted, inheritable
    assert libc.capget(ctypes.byref(header), held) == 0
    effective, before = held[0], resource.getrlimit(resource.RLIMIT_MEMLOCK)
    hard = before[1] if before[1] != resource.RLIM_INFINITY else limit_bytes
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(limit_bytes, hard), before[1]))
    try:
        held[0] = effective & ~(1 << IPC_LOCK)
        assert libc.capset(ctypes.byref(header), held) == 0
        yield
    finally:
        held[0] = effective
        assert libc.capset(ctypes.byref(header), held) == 0
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)


class Locking(Card):
    """Pins by mlock(2), which the kernel counts against the limit."""

    def pin(self, span: torch.Tensor) -> str | None:
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mlock(ctypes.c_void_p(span.data_ptr()), ctypes.c_size_t(span.numel()))
        self.refusal = os.strerror(ctypes.get_errno()) if failed else None
        return super().pin(span)

    def unpin(self, span: torch.Tensor) -> None:
        assert ctypes.CDLL(None).munlock(ctypes.c_void_p(span.data_ptr()), ctypes.c_size_t(span.numel())) == 0
        super().unpin(span)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and capabilities as Linux has them")
def test_what_the_kernel_refuses_is_told_once_in_a_run_and_every_stage_goes_on(tiny_klein: Path) -> None:
    """A plan of another machine's profile may pin; this process may not. Both stages share what the run was told."""
    folder = tiny_klein / "transformer"
    told: list[str] = []
    plenty = Pinning(PLENTY, 25e9, 10e9)
    with memlock(PLENTY):
        assert stream(folder, Placement.PINNED, Locking(), plenty, told) > 0
    assert told == []
    with memlock(0):
        for placement in (Placement.PINNED, Placement.DISK):
            assert stream(folder, placement, Locking(), plenty, told) == 0
    (line,) = told
    assert "Operation not permitted" in line or "Cannot allocate memory" in line
    assert "ulimit -l" in line
