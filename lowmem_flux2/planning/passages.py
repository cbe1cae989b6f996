"""Where blocks rest, in bytes of each tier, and how each comes to the compute device, and in what time."""

from __future__ import annotations

import math
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


class FileForm(NamedTuple):
    """How blocks in their files compare with what they are at rest in memory.

    ``stored`` bytes there are ``held`` bytes here: (4, 2) where an fp32 checkpoint is read as bf16. Values that are
    decoded while they are read come at ``decoded_bytes_per_s`` of what is held, by the thread that reads.
    """

    stored: int = 1
    held: int = 1
    decoded_bytes_per_s: float = math.inf

    def in_file(self, span_bytes: int) -> int:
        """What is read to fill so many bytes of spans, their padding counted as if it were read."""
        return span_bytes * self.stored // self.held

    def decode_ns(self, span_bytes: int) -> int:
        """To decode so many bytes of spans."""
        return nanoseconds(span_bytes, self.decoded_bytes_per_s)


AS_HELD = FileForm()
"""The prepared store's: what rests in memory, padding and all."""


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


def passage(placement: Placement, block_bytes: int, hardware: Hardware, file_form: FileForm = AS_HELD) -> Passage:
    """How one block comes to the compute device from where it rests, and how long each part takes.

    On a GPU a disk block is read into the pinned ring and copied from there. On a CPU the worker thread brings every
    block: it copies those in RAM, and reads those on disk right into their slot.
    """
    if placement is Placement.GPU:
        return Passage(Way.RESIDENT, 0, 0)
    read = nanoseconds(file_form.in_file(block_bytes), hardware.disk_read_bytes_per_s) + file_form.decode_ns(
        block_bytes
    )
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
    stage: StagePlan, sizes: Sequence[int], hardware: Hardware, file_form: FileForm = AS_HELD
) -> list[Passage]:
    """One for each block, in the order of use."""
    ways = {pair: passage(*pair, hardware, file_form) for pair in set(zip(stage.block_placements, sizes, strict=True))}
    return [ways[pair] for pair in zip(stage.block_placements, sizes, strict=True)]
