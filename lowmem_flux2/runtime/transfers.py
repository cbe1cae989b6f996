"""How fast bytes move here: host to device, page-locking, and reading weights from disk with a cold page cache."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import torch

from lowmem_flux2.errors import RunError
from lowmem_flux2.runtime.device import register_pinned, unregister_pinned
from lowmem_flux2.runtime.layout import allocate
from lowmem_flux2.runtime.measurements import Bench, Reading
from lowmem_flux2.runtime.rawfile import RawFile
from lowmem_flux2.units import MIB, format_bytes

COPY_BYTES = 256 * MIB
READ_BYTES = 32 * MIB
LEAST_FILE_BYTES, MOST_FILE_BYTES = 2 * READ_BYTES, 1024 * MIB
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_HOST = torch.device("cpu")


def copies(bench: Bench) -> list[Reading]:
    """Pageable and pinned copies to the device and the pin rate; on a CPU the copy in RAM that stands for all three.

    Raises:
        RunError: nothing could be page-locked.
    """
    size = COPY_BYTES
    source, target = allocate(size, _HOST).zero_(), allocate(size, bench.device)
    timing = bench.time(lambda: target.copy_(source), share=0.4)
    rate = size / timing.median_s
    if bench.device.type == "cpu":
        how = f"{format_bytes(size)} copied in RAM, {timing}"
        return [Reading(f"h2d_{kind}_bytes_per_s", rate, how) for kind in ("pinned", "pageable")]
    readings = [Reading("h2d_pageable_bytes_per_s", rate, f"{format_bytes(size)} from pageable memory, {timing}")]
    arena = allocate(size, _HOST)  # never touched: its pages are made when it is pinned, as those of an arena are
    start = time.perf_counter()
    failure = register_pinned(arena, bench.device)
    taken = time.perf_counter() - start
    if failure is not None:
        raise RunError(f"could not page-lock {format_bytes(size)}: {failure}")
    try:
        timing = bench.time(lambda: target.copy_(arena, non_blocking=True), share=0.4)
    finally:
        unregister_pinned(arena)
    pinned = size / timing.median_s
    readings.append(Reading("h2d_pinned_bytes_per_s", pinned, f"{format_bytes(size)} from registered memory, {timing}"))
    readings.append(Reading("pin_bytes_per_s", size / taken, f"{format_bytes(size)} touched and registered, one run"))
    # Staged copies of one buffer can be as fast as pinned ones where the link is the slower part, never faster.
    return [Reading(one.field, min(one.value, pinned), one.how) if "pageable" in one.field else one for one in readings]


def disk(bench: Bench, folder: Path) -> list[Reading]:
    """Cold sequential read as blocks that rest on disk are read, and what loading through the page cache reaches of it.

    Reads a file of noise that is written into ``folder`` for it, as large as half of the slice can write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _noise_file(folder, bench.slice_s / 2) as path, closing(RawFile(path)) as file:
        length, evicted = path.stat().st_size, _evict(path)
        cold = "past the page cache (O_DIRECT)" if file.is_direct else f"through the page cache, {evicted}"
        streamed = _read(file, length, bench.slice_s / 4, into=allocate(READ_BYTES, _HOST).zero_())
        _evict(path)
        loaded = _read(file, length, bench.slice_s / 4, into=None)
    size, reads = format_bytes(length), f"median of {READ_BYTES // MIB} MiB reads"
    return [
        Reading("disk_read_bytes_per_s", streamed, f"{size} in {folder}, {cold}, {reads}"),
        Reading("load_share", loaded / streamed, f"{loaded / 1e9:.4g} GB/s into fresh memory, {evicted}, {reads}"),
    ]


@contextmanager
def _noise_file(folder: Path, limit_s: float) -> Iterator[Path]:
    """A file that nothing compresses, on disk, for as long as the block lasts."""
    most = min(MOST_FILE_BYTES, shutil.disk_usage(folder).free // 4)
    if most < LEAST_FILE_BYTES:
        raise RunError(f"{folder} has room for {format_bytes(most)} only, {format_bytes(LEAST_FILE_BYTES)} are needed")
    path = folder / f".calibrate.{os.getpid()}.tmp"
    noise = os.urandom(READ_BYTES)
    end = time.perf_counter() + limit_s
    try:
        with path.open("wb") as file:
            while file.tell() < LEAST_FILE_BYTES or (file.tell() < most and time.perf_counter() < end):
                file.write(noise)
                file.flush()
                os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _evict(path: Path) -> str:
    """Put the file's pages out of the page cache; says how.

    Everybody's cache is dropped (root only) just where the file's own pages do not go by themselves.
    """
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not _is_cached(file.fileno()):
                return "after posix_fadvise"
    try:
        _DROP_CACHES.write_text("1")
    except OSError:
        return "which may have had it: the file could not be evicted"
    return "after dropping caches"


def _is_cached(descriptor: int) -> bool:
    """Whether the first page is in the page cache: a read that must not wait says so. True where nothing says."""
    try:
        os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return True
    return True


def _read(file: RawFile, size_bytes: int, limit_s: float, into: torch.Tensor | None) -> float:
    """Bytes per second, the median of reads as streaming makes them, into a slot (``into``), or as loading, into memory
    that has not been touched."""
    end = time.perf_counter() + limit_s
    rates: list[float] = []
    for offset in range(0, size_bytes, READ_BYTES):
        span = allocate(READ_BYTES, _HOST) if into is None else into
        start = time.perf_counter()
        file.read_into(span, offset, direct=into is not None)
        now = time.perf_counter()
        rates.append(READ_BYTES / (now - start))
        if now > end:
            break
    return median(rates)
