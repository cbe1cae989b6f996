"""A variant of a stage with its blocks in an order: bytes and passages of any cut into tiers, by running sums.

The first blocks of the order are resident, the next pinned, the next pageable, the last on disk. A cut is given by the
ranks where the tiers end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from lowmem_flux2.planning.cost import device_room_bytes, device_total_bytes, host_bytes, room_bytes
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.passages import Tiers, passage
from lowmem_flux2.planning.plan import Limits, Placement, StagePlan
from lowmem_flux2.planning.stage_work import StageWork
from lowmem_flux2.planning.timeline import Passage, Way

GOLDEN = (5**0.5 - 1) / 2
"""Steps of this part of a circle leave no large gap and no cluster after any number of them."""


@lru_cache(maxsize=64)
def residency_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Largest blocks first: they take longest to copy, and leaving them out shrinks the slots. Each size spread evenly.

    However many are resident, and however many follow in RAM, each tier is spread over the step, and the copies between
    two residents have compute to hide behind.
    """
    order: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        group = [index for index, other in enumerate(sizes) if other == size]
        order += [group[place] for place in _spread([1] * len(group))]
    return tuple(order)


@lru_cache(maxsize=64)
def spread_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks of all sizes spread over the step alike: where the disk has a part in it, it is never idle for long."""
    return tuple(_spread(sizes))


def _spread(sizes: Sequence[int]) -> list[int]:
    """Indices by golden steps around the blocks laid end to end: each time the nearest that is left."""
    ends = [0, *accumulate(sizes)]
    middles = [(begin + end) / 2 for begin, end in pairwise(ends)]
    left, order, at = list(range(len(sizes))), [], 0.5
    while left:
        target = at * ends[-1]
        nearest = min(left, key=lambda index: (_apart(middles[index], target, ends[-1]), index))
        left.remove(nearest)
        order.append(nearest)
        at = (at + GOLDEN) % 1
    return order


def _apart(one: float, other: float, around: float) -> float:
    return min(abs(one - other), around - abs(one - other))


class Least(NamedTuple):
    """The least that a variant with so many residents needs, in bytes; ``pinned`` is the part of RAM that must be."""

    vram: int
    ram: int
    pinned: int

    def beyond(self, limits: Limits) -> tuple[int, int, int]:
        """What is short of VRAM, of RAM and of pinnable RAM."""
        return (
            max(self.vram - limits.vram_bytes, 0),
            max(self.ram - limits.ram_bytes, 0),
            max(self.pinned - limits.pinnable_bytes, 0),
        )

    def fits(self, limits: Limits) -> bool:
        return self.vram <= limits.vram_bytes and self.ram <= limits.ram_bytes and self.pinned <= limits.pinnable_bytes


@dataclass(frozen=True)
class Variant:
    """A stage but for slots and placements, and what it works on."""

    bare: StagePlan
    work: StageWork
    hardware: Hardware

    @cached_property
    def needs(self) -> dict[str, list[Least]]:
        """What ``Job.least`` found, by ``Selection.placement``."""
        return {}

    @cached_property
    def blocks(self) -> TieredBlocks:
        """In residency order. Made when first looked at: of most variants nobody does."""
        return TieredBlocks(self, residency_order(self.work.block_bytes))

    @cached_property
    def spread_blocks(self) -> TieredBlocks:
        """In spread order."""
        return TieredBlocks(self, spread_order(self.work.block_bytes))


class TieredBlocks:
    """A variant's blocks in some order, with running sums of their bytes and of what their passages take."""

    def __init__(self, variant: Variant, order: tuple[int, ...]) -> None:
        self.bare, self.work, self.hardware = variant.bare, variant.work, variant.hardware
        work, hardware = self.work, self.hardware
        self.on_host = hardware.device == "cpu"
        self.total = len(work.block_bytes)
        self.order = order
        self.rank = [0] * self.total
        for rank, index in enumerate(self.order):
            self.rank[index] = rank
        self.sizes = [work.block_bytes[index] for index in self.order]
        self.bytes = _sums(self.sizes)
        self.smallest = min(self.sizes)
        self.largest_resident = [0, *accumulate(self.sizes, max)]
        self.largest_streamed = [0, *accumulate(reversed(self.sizes), max)][::-1]
        ways = {
            (placement, size): passage(placement, size, hardware, work.file_form)
            for size in set(self.sizes)
            for placement in Placement
        }
        pinned, pageable, disk = (
            {size: ways[placement, size] for size in set(self.sizes)}
            for placement in (Placement.PINNED, Placement.PAGEABLE, Placement.DISK)
        )
        either = {size: _either(pageable[size], disk[size]) for size in disk}
        self.pinned, self.pageable, self.disk, self.either = (
            list(map({size: way.packed for size, way in kind.items()}.__getitem__, work.block_bytes))
            for kind in (pinned, pageable, disk, either)
        )
        self.copy_pinned = _sums(pinned[size].copy_ns for size in self.sizes)
        self.copy_pageable = _sums(pageable[size].copy_ns for size in self.sizes)
        self.reads = _sums(disk[size].copy_ns if self.on_host else disk[size].read_ns for size in self.sizes)
        self.compute = [float(compute) for compute in work.compute_ns]
        self.compute_ns = sum(work.compute_ns) + work.between_ns
        self.after_read_ns = min(
            (0 if self.on_host else disk[size].copy_ns) + compute
            for size, compute in zip(work.block_bytes, work.compute_ns, strict=True)
        )

    def vram(self, resident: int, slots: int) -> int:
        """Peak VRAM of so many resident blocks and slots; 0 on a CPU."""
        if self.on_host:
            return 0
        held = self.bytes[resident] + slots * self.largest_streamed[resident]
        return self.hardware.context_bytes + device_total_bytes(self.work, held)

    def peak(self, resident: int, slots: int) -> int:
        """Peak of the compute device's memory: VRAM, or on a CPU RAM, with the other blocks on disk."""
        return self.ram(self.tiers(resident, resident, resident, slots)) if self.on_host else self.vram(resident, slots)

    def ram(self, tiers: Tiers) -> int:
        return tiers.pinned + tiers.ring + host_bytes(self.work, tiers, self.on_host)

    def ram_and_pinned(self, resident: int, pinned: int, ram: int, slots: int) -> tuple[int, int]:
        """Peak RAM of a cut, and what of it must be pinned: the ring only where blocks are, as it works unpinned."""
        tiers = self.tiers(resident, pinned, ram, slots)
        return self.ram(tiers), tiers.pinned + tiers.ring if tiers.pinned else 0

    def fitting(self, numbers: Iterable[int], slots: int, all_in_ram: bool, limits: Limits) -> list[int]:
        """The numbers of residents that fit the device; on a CPU that is RAM, which then holds the others too."""
        if self.on_host and all_in_ram:
            end = self.total
            return [
                resident
                for resident in numbers
                if self.ram(self.tiers(resident, resident, end, slots)) <= limits.ram_bytes
            ]
        if self.on_host:
            if host_bytes(self.work, EMPTY, on_host=True) > limits.ram_bytes:
                return []
            room = device_room_bytes(self.work, room_bytes(self.work, limits.ram_bytes))
        else:
            room = device_room_bytes(self.work, limits.vram_bytes - self.hardware.context_bytes)
        sums, largest = self.bytes, self.largest_streamed
        return [resident for resident in numbers if sums[resident] + slots * largest[resident] <= room]

    def tiers(self, resident: int, pinned: int, ram: int, slots: int) -> Tiers:
        """``pinned`` and ``ram`` are the ranks where pinned blocks and blocks in RAM end."""
        sums, slot_bytes = self.bytes, slots * self.largest_streamed[resident]
        return Tiers(
            gpu=sums[resident],
            pinned=sums[pinned] - sums[resident],
            pageable=sums[ram] - sums[pinned],
            disk=sums[-1] - sums[ram],
            largest_resident=self.largest_resident[resident],
            slots=slot_bytes,
            ring=slot_bytes if ram < self.total and not self.on_host else 0,
        )

    def traffic(self, resident: int, pinned: int, sure: int, ram: int) -> tuple[int, int]:
        """(reads, copies) of a round, in nanoseconds, where blocks from ``sure`` to ``ram`` are in RAM or on disk."""
        reads = self.reads[-1] - self.reads[max(ram, resident)]
        if self.on_host:
            return reads, self.copy_pageable[ram] - self.copy_pageable[resident] if ram > resident else 0
        copies = self.copy_pinned[-1] - self.copy_pinned[resident]
        if sure > pinned:
            slow, fast = self.copy_pageable, self.copy_pinned
            copies += slow[sure] - slow[pinned] - (fast[sure] - fast[pinned])
        return reads, copies

    def ways(self, resident: int, pinned: int, sure: int, ram: int) -> list[tuple[int, float, float]]:
        """The passage of each block, in the order of use; between ``sure`` and ``ram`` the better of RAM and disk."""
        return [
            _RESIDENT
            if rank < resident
            else self.pinned[index]
            if rank < pinned
            else self.pageable[index]
            if rank < sure
            else self.either[index]
            if rank < ram
            else self.disk[index]
            for index, rank in enumerate(self.rank)
        ]


EMPTY = Tiers(0, 0, 0, 0, 0, 0, 0)
_RESIDENT = Passage(Way.RESIDENT, 0, 0).packed


def _sums(values: Iterable[int]) -> list[int]:
    return [0, *accumulate(values)]


def _either(pageable: Passage, disk: Passage) -> Passage:
    """A way that is no slower than either, in each lane."""
    if disk.way is Way.PAGEABLE:  # on a CPU
        return Passage(Way.PAGEABLE, 0, min(pageable.copy_ns, disk.copy_ns))
    copy = min(disk.copy_ns, pageable.copy_ns)
    return Passage(Way.DISK, max(0, min(disk.read_ns, pageable.copy_ns - copy)), copy)
