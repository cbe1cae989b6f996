"""Where blocks rest, in bytes of each tier, and how each comes to the compute device, and in what time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.timeline import Passage, Way, nanoseconds


class Tiers(NamedTuple):
    """Bytes of the blocks at each placement, of the largest resident block and of all slots.

    ``ring`` is the pinned ring that disk blocks pass through on a GPU.
    """

    gpu: int
    pinned: int
    pageable: int
    disk: int
    largest_resident: int
    slots: int
    ring: int


FileRatio = tuple[int, int]
"""Bytes of a weight in its file, and at rest in memory: (4, 2) where an fp32 checkpoint is read as bf16."""


def in_file(span_bytes: int, ratio: FileRatio) -> int:
    """What is read to fill so many bytes of spans, their padding counted as if it were read."""
    return span_bytes * ratio[0] // ratio[1]


def tiers_of(stage: StagePlan, sizes: Sequence[int], on_host: bool) -> Tiers:
    at = dict.fromkeys(Placement, 0)
    resident = streamed = 0
    for placement, size in zip(stage.block_placements, sizes, strict=True):
        at[placement] += size
        if placement is Placement.GPU:
            resident = max(resident, size)
        else:
            streamed = max(streamed, size)
    slots = stage.slots * streamed
    ring = slots if at[Placement.DISK] and not on_host else 0
    return Tiers(
        gpu=at[Placement.GPU],
        pinned=at[Placement.PINNED],
        pageable=at[Placement.PAGEABLE],
        disk=at[Placement.DISK],
        largest_resident=resident,
        slots=slots,
        ring=ring,
    )


def passage(placement: Placement, block_bytes: int, hardware: Hardware, file_ratio: FileRatio = (1, 1)) -> Passage:
    """How one block comes to the compute device from where it rests, and how long each part takes.

    On a GPU a disk block is read into the pinned ring and copied from there. On a CPU the worker thread brings every
    block: it copies those in RAM, and reads those on disk right into their slot.
    """
    if placement is Placement.GPU:
        return Passage(Way.RESIDENT, 0, 0)
    read = nanoseconds(in_file(block_bytes, file_ratio), hardware.disk_read_bytes_per_s)
    pageable = nanoseconds(block_bytes, hardware.h2d_pageable_bytes_per_s)
    if hardware.device == "cpu":
        return Passage(Way.PAGEABLE, 0, read if placement is Placement.DISK else pageable)
    if placement is Placement.PAGEABLE:
        return Passage(Way.PAGEABLE, 0, pageable)
    copy = nanoseconds(block_bytes, hardware.h2d_pinned_bytes_per_s)
    if placement is Placement.PINNED:
        return Passage(Way.PINNED, 0, copy)
    return Passage(Way.DISK, read, copy)


def passages(
    stage: StagePlan, sizes: Sequence[int], hardware: Hardware, file_ratio: FileRatio = (1, 1)
) -> list[Passage]:
    """One for each block, in the order of use."""
    ways = {pair: passage(*pair, hardware, file_ratio) for pair in set(zip(stage.block_placements, sizes, strict=True))}
    return [ways[pair] for pair in zip(stage.block_placements, sizes, strict=True)]
