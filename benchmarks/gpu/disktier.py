"""Part (f): weights on disk, written once, streamed with O_DIRECT from a cold cache."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.case import Case
from gpu.generated import Pieces, block_sources
from gpu.running import Bench, carry_out, with_placements
from gpu.subjects import Subject
from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.runtime.components import Blocks, transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.layout import BlockSource, allocate
from lowmem_flux2.runtime.rawfile import RawFile
from lowmem_flux2.runtime.store import StoredBlock, block_path
from lowmem_flux2.units import GIB

STEPS = 3
SLOTS = 2
MOST_BYTES = 40 * GIB
SPARE_BYTES = 2 * GIB


def cases(bench: Bench) -> list[Case]:
    """A small one first: the disk's speed is not known beforehand."""
    plain = compute_dtype(Selection(), bench.machine.hardware)
    sized = (("klein-9b", "int8", 60.0), ("dev", "nf4", 110.0), ("dev", "int8", 220.0), ("klein-4b", plain, 59.0))
    return [
        Case(f"{name}-{form}", partial(_stream, name, form), 5 if bench.tiny else guess_s, timeout_s=300)
        for name, form, guess_s in sized
    ]


def _stream(name: str, weight_format: str, bench: Bench) -> dict[str, Any]:
    model = bench.subject(name)
    request = bench.request(model, STEPS)
    plan = bench.plan(model, request, weight_format=weight_format, placement="resident")
    folder = bench.scratch / "disk" / f"{model.name}-{weight_format}{'-tiny' if bench.tiny else ''}"
    written = _write(folder, model, plan.stage("denoise"), bench.pieces)
    raw_bytes_per_s, is_direct = _read_rate(folder)
    blocks = len(plan.stage("denoise").block_placements)
    on_disk = with_placements(plan, model, "denoise", [Placement.DISK] * blocks, SLOTS)
    pinned = with_placements(plan, model, "denoise", [Placement.PINNED] * blocks, SLOTS)
    embeds = bench.embeds(model, plan)

    def from_disk(stage: StagePlan, parts: Blocks, pieces: Pieces) -> list[BlockSource]:
        sources = block_sources(stage, parts, pieces)
        paths = [block_path(folder, index) for index in range(len(sources))]
        # Written without checksums: nothing to verify.
        return [StoredBlock(source.layout, path, (), True) for source, path in zip(sources, paths, strict=True)]

    _forget(folder)
    disk = carry_out(bench, model, on_disk, request, embeds=embeds, make_sources=from_disk)
    ram = carry_out(bench, model, pinned, request, embeds=embeds)
    streamed_bytes = sum(path.stat().st_size for path in folder.glob("*.bin"))
    equal = torch.equal(disk.latents, ram.latents)
    return {
        "met": equal,
        "bit_equal_to_ram": equal,
        "is_direct": is_direct,
        "streamed_bytes_per_step": streamed_bytes,
        "written": written,
        "raw_read_bytes_per_s": raw_bytes_per_s,
        "read_bytes_per_s": streamed_bytes / disk.step_s,
        "ratio_to_pinned": disk.step_s / ram.step_s,
        "from_disk": disk.figures,
        "pinned": ram.figures,
        "line": f"step {disk.step_s:.2f} s from disk ({streamed_bytes / disk.step_s / 1e9:.2f} GB/s, the disk alone "
        f"{raw_bytes_per_s / 1e9:.2f}), {ram.step_s:.2f} s from pinned RAM, "
        f"{'O_DIRECT' if is_direct else 'BUFFERED'}, {'bit-equal' if equal else 'NOT EQUAL'}",
    }


def _write(folder: Path, model: Subject, stage: StagePlan, pieces: Pieces) -> dict[str, Any] | None:
    """One file a block, as in the prepared store; None if they are there. Another model's files go first.

    Raises:
        DoesNotFit: more than MOST_BYTES, or than the disk has.
    """
    if folder.exists():
        return None
    shutil.rmtree(folder.parent, ignore_errors=True)
    sources = block_sources(stage, transformer_blocks(transformer_on_meta(model.folder / "transformer")), pieces)
    needed = sum(source.layout.total_bytes for source in sources)
    folder.parent.mkdir(parents=True)
    there = min(shutil.disk_usage(folder.parent).free - SPARE_BYTES, MOST_BYTES)
    if needed > there:
        raise DoesNotFit("denoise", "disk", needed, there)
    partial_folder = folder.with_name(f".{folder.name}")
    partial_folder.mkdir()
    span = allocate(max(source.layout.total_bytes for source in sources), torch.device("cpu"))
    start = time.perf_counter()
    for index, source in enumerate(sources):
        part = span[: source.layout.total_bytes]
        source.read_into(part)
        with block_path(partial_folder, index).open("wb") as file:
            file.write(memoryview(part.numpy().data))
            file.flush()
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    partial_folder.rename(folder)
    return {"bytes": needed, "seconds": seconds}


def _read_rate(folder: Path, most_bytes: int = 4 * GIB) -> tuple[float, bool]:
    """Bytes a second of reading block after block past the page cache on one thread, and whether it went past it."""
    _forget(folder)
    read, seconds, is_direct = 0, 0.0, True
    for path in sorted(folder.glob("*.bin")):
        size = path.stat().st_size
        span = allocate(size, torch.device("cpu")).zero_()
        file = RawFile(path)
        is_direct = is_direct and file.is_direct
        start = time.perf_counter()
        file.read_into(span, 0, direct=True)
        seconds += time.perf_counter() - start
        file.close()
        read += size
        if read > most_bytes:
            break
    return read / seconds, is_direct


def _forget(folder: Path) -> None:
    """Ask the system to drop these files' pages, so that a fall-back to buffered reads is cold too."""
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
