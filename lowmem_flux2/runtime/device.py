"""The compute device and its meters. Only this file asks CUDA about itself."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.identity import cpu_model
from lowmem_flux2.units import MIB

SAMPLE_INTERVAL_S = 0.005
_STATUS = Path("/proc/self/status")
_IO = Path("/proc/self/io")
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_MALLOC_TRIM = getattr(_LIBC, "malloc_trim", None)
_MALLOPT = getattr(_LIBC, "mallopt", None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_PIECE_BYTES = 8 * MIB
"""On a CPU, freed pieces from this size on go back to the system at once. By itself glibc comes to keep those of up to
32 MiB in its heaps, where a 1024x1024 picture's tensors of 27 MiB leave 500 MiB lying between them, and a 512x512 one's
400. New pages cost: blocks take 5 % longer at 1024x1024 and 256x256, 20 to 30 at 512x512, on two Xeon cores with AMX,
whose matmuls are fast (2026-11-27); from 1 MiB on it would be 50 % at 256x256."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Names of compute dtypes and unquantized weight formats."""


def torch_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1`` as torch.device, made the current one.

    Raises:
        UsageError: CUDA asked for but this torch build or machine has none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device {name}: this torch ({torch.__version__}) finds no CUDA GPU; see 'lowmem-flux2 doctor', "
            "or use --device cpu"
        )
    if device.type == "cpu":
        _return_large_pieces()
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # set_device and others refuse one without a number
        torch.cuda.set_device(device)
    return device


def _return_large_pieces() -> None:
    """Tell glibc, unless whoever started this process has."""
    told = "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "") or "MALLOC_MMAP_THRESHOLD_" in os.environ
    if _MALLOPT is not None and not told:
        _MALLOPT(_M_MMAP_THRESHOLD, KEPT_PIECE_BYTES)
        _MALLOPT(_M_TRIM_THRESHOLD, 2 * KEPT_PIECE_BYTES)  # as glibc sets both


def arithmetic_of(device: torch.device) -> dict[str, object]:
    """What decides, besides libraries and input, how sums round here: the processor and the settings of torch.

    The number of threads is among them: with three, a CPU's fp32 Linear differs in its last bits from one with two.
    """
    settings: dict[str, object] = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type != "cuda":
        threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
        return settings | {"processor": cpu_model(), "capability": capability, "threads": threads}
    cuda, matmul = torch.backends.cuda, torch.backends.cuda.matmul
    return settings | {
        "processor": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fp16_reduction": matmul.allow_fp16_reduced_precision_reduction,
        "bf16_reduction": matmul.allow_bf16_reduced_precision_reduction,
        "attention": [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()],
    }


def cap_vram(device: torch.device, max_vram_bytes: int, context_bytes: int) -> None:
    """Make ``max_vram_bytes`` a hard cap: allocations beyond it raise OutOfMemoryError instead of taking more.

    The allocator's share is the cap less the CUDA context, which no allocator sees.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(1.0, max(0.0, (max_vram_bytes - context_bytes) / total))
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class AllocatorUse:
    """Device memory of CUDA's caching allocator in bytes: in tensors and workspaces, and held from the driver."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int


def allocator_use(device: torch.device) -> AllocatorUse:
    """Now, and at the peak since the process began or the last stage was measured."""
    return AllocatorUse(
        torch.cuda.memory_allocated(device),
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
    )


def register_pinned(span: torch.Tensor, device: torch.device) -> str | None:
    """Page-lock host memory where it is; None, or what CUDA says against it."""
    span.zero_()  # touch every page first: registration of untouched pages faults them one by one
    code = torch.cuda.cudart().cudaHostRegister(span.data_ptr(), span.numel(), 0)
    if int(code) == 0:
        return None
    # The failure stays behind as the thread's last error, and the next kernel launch would be blamed for it.
    try:
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        pass
    return f"CUDA error {int(code)}"


def unregister_pinned(span: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(span.data_ptr())


def release_memory(device: torch.device, after_failure: bool = False) -> None:
    """Give freed blocks back to the driver and the system, after the stage's last reference is gone.

    On a CPU reference counts have freed them already, and a full collection takes 0.3 s over the libraries' objects;
    but an exception that went through them may have left cycles.
    """
    if device.type == "cuda" or after_failure:
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if _MALLOC_TRIM is not None:  # glibc keeps freed pieces of up to 32 MiB in its heaps: a stage's leavings add up
        _MALLOC_TRIM(0)


def exhausted(error: BaseException) -> Literal["device", "host"] | None:
    """Whose memory ran out, where the error says so; None for any other error.

    Torch's own types cover only its allocator on the device: host memory, CUDA's runtime and its libraries say it in
    words (c10/core/impl/alloc_cpu.cpp, c10/cuda/CUDAException.h, aten/src/ATen/cuda/CUDABlas.cpp).
    """
    if isinstance(error, torch.OutOfMemoryError):
        return "device"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "host"
    if isinstance(error, RuntimeError):
        text = str(error)
        if "DefaultCPUAllocator: " in text and "memory" in text:
            return "host"
        if "CUDA error: out of memory" in text or "_STATUS_ALLOC_FAILED" in text:
            return "device"
    return None


@dataclass(frozen=True, slots=True)
class HostUse:
    """RAM of this process in bytes. ``anonymous`` includes shared memory; ``rss`` also file-backed pages."""

    anonymous_bytes: int
    rss_bytes: int


def host_use() -> HostUse:
    """Now. Outside Linux, where the kinds are not told apart, both figures are the whole RSS."""
    if not _STATUS.exists():
        rss = psutil.Process().memory_info().rss
        return HostUse(rss, rss)
    fields = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssShmem"):
            fields[name] = int(value.split()[0]) * 1024
    if "RssAnon" not in fields:  # a sandbox's /proc
        return HostUse(fields["VmRSS"], fields["VmRSS"])
    return HostUse(fields["RssAnon"] + fields["RssShmem"], fields["VmRSS"])


def disk_read_bytes() -> int | None:
    """Bytes that the block device has read for this process so far; None where the system does not tell."""
    with suppress(OSError):
        for line in _IO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "read_bytes":
                return int(value)
    return None


@dataclass(slots=True)
class Measure:
    """What a stage took, filled in when its ``measure`` block ends. Bytes and seconds.

    Host peaks are sampled every 5 ms, so a shorter spike can be missed. ``peak_vram_bytes`` is the allocator's peak
    reserved memory and the context; ``driver_used_bytes`` is what the driver says is used on the whole card at the end.
    """

    time_s: float = 0.0
    peak_ram_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_vram_bytes: int = 0
    peak_allocated_bytes: int = 0
    driver_used_bytes: int = 0
    disk_read_bytes: int | None = None


class _HostSampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True, name="host-memory-sampler")
        self.peak = host_use()
        self._stopped = threading.Event()

    def _take(self) -> None:
        now = host_use()
        self.peak = HostUse(
            max(self.peak.anonymous_bytes, now.anonymous_bytes), max(self.peak.rss_bytes, now.rss_bytes)
        )

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_INTERVAL_S):
            self._take()

    def stop(self) -> HostUse:
        self._stopped.set()
        self.join()
        self._take()
        return self.peak


@contextmanager
def measure(device: torch.device, context_bytes: int) -> Iterator[Measure]:
    """Meter the block: wall time, host peaks, device peaks.

    Arenas are pinned by registering ordinary memory, which stays in the anonymous RSS: nothing is added for them.
    """
    taken = Measure()
    sampler = _HostSampler()
    sampler.start()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    read_before = disk_read_bytes()
    start = time.perf_counter()
    try:
        yield taken
    finally:
        taken.time_s = time.perf_counter() - start
        peak = sampler.stop()
        taken.peak_ram_bytes = peak.anonymous_bytes
        taken.peak_rss_bytes = peak.rss_bytes
        read_after = disk_read_bytes()
        if read_before is not None and read_after is not None:
            taken.disk_read_bytes = read_after - read_before
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            taken.time_s = time.perf_counter() - start
            taken.peak_allocated_bytes = torch.cuda.max_memory_allocated(device)
            taken.peak_vram_bytes = torch.cuda.max_memory_reserved(device) + context_bytes
            free, total = torch.cuda.mem_get_info(device)
            taken.driver_used_bytes = total - free
