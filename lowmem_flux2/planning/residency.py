"""A variant of a stage with its blocks in residency order: bytes and passages of any cut into tiers, by running sums.

The first blocks of the order are resident, the next pinned, the next pageable, the last on disk. A cut is given by the
ranks where the tiers end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from lowmem_flux2.planning.cost import StageWork, Tiers, device_bytes, host_bytes, passage
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Limits, Placement, StagePlan
from lowmem_flux2.planning.timeline import Passage, Way


@lru_cache(maxsize=64)
def residency_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Largest blocks first (they take longest to copy, and leaving them out shrinks the slots), spread evenly.

    Among equals, indices are visited in halving strides, so that any number of residents is spread over the step and
    the copies between two residents have compute to hide behind; the same for the faster host tiers after them.
    """
    order: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        group = [index for index, other in enumerate(sizes) if other == size]
        stride = len(group)
        taken: set[int] = set()
        while len(taken) < len(group):
            for at in range(0, len(group), max(stride, 1)):
                if at not in taken:
                    taken.add(at)
                    order.append(group[at])
            stride //= 2
    return tuple(order)


@dataclass(frozen=True)
class Variant:
    """A stage but for slots and placements, and what it works on."""

    bare: StagePlan
    work: StageWork
    hardware: Hardware

    @cached_property
    def blocks(self) -> TieredBlocks:
        """Made when first looked at: of most variants nobody does."""
        return TieredBlocks(self)


class TieredBlocks:
    """A variant's blocks in residency order, with running sums of their bytes and of what their passages take."""

    def __init__(self, variant: Variant) -> None:
        self.bare, self.work, self.hardware = variant.bare, variant.work, variant.hardware
        work, hardware = self.work, self.hardware
        self.on_host = hardware.device == "cpu"
        self.total = len(work.block_bytes)
        self._vram: dict[tuple[int, int], int] = {}
        self.order = residency_order(work.block_bytes)
        self.rank = [0] * self.total
        for rank, index in enumerate(self.order):
            self.rank[index] = rank
        self.sizes = [work.block_bytes[index] for index in self.order]
        self.bytes = _sums(self.sizes)
        ways = {
            (placement, size): passage(placement, size, hardware) for size in set(self.sizes) for placement in Placement
        }
        self.pinned = [ways[Placement.PINNED, size] for size in work.block_bytes]
        self.pageable = [ways[Placement.PAGEABLE, size] for size in work.block_bytes]
        self.disk = [ways[Placement.DISK, size] for size in work.block_bytes]
        either = {size: _either(ways[Placement.PAGEABLE, size], ways[Placement.DISK, size]) for size in set(self.sizes)}
        self.either = [either[size] for size in work.block_bytes]
        self.copy_pinned = _sums(self.pinned[index].copy_ns for index in self.order)
        self.copy_pageable = _sums(self.pageable[index].copy_ns for index in self.order)
        reads = [way.copy_ns if self.on_host else way.read_ns for way in self.disk]
        self.reads = _sums(reads[index] for index in self.order)
        self.compute_ns = sum(work.compute_ns) + work.between_ns
        self.after_read_ns = min(
            (0 if self.on_host else way.copy_ns) + compute
            for way, compute in zip(self.disk, work.compute_ns, strict=True)
        )

    def largest_streamed(self, resident: int) -> int:
        return self.sizes[resident] if resident < self.total else 0

    def vram(self, resident: int, slots: int) -> int:
        """Peak VRAM of so many resident blocks and slots; 0 on a CPU."""
        if self.on_host:
            return 0
        if (found := self._vram.get((resident, slots))) is None:
            device = device_bytes(self.work, self.bytes[resident], slots * self.largest_streamed(resident))
            found = self._vram[resident, slots] = self.hardware.context_bytes + sum(device)
        return found

    def peak(self, resident: int, slots: int) -> int:
        """Peak of the compute device's memory: VRAM, or on a CPU RAM, with the other blocks on disk."""
        return self.ram(self.tiers(resident, resident, resident, slots)) if self.on_host else self.vram(resident, slots)

    def ram(self, tiers: Tiers) -> int:
        return tiers.pinned + tiers.ring + host_bytes(self.work, tiers, self.on_host)

    def ram_and_pinned(self, resident: int, pinned: int, ram: int, slots: int) -> tuple[int, int]:
        """Peak RAM of a cut, and what of it must be pinned: the ring only where blocks are, as it works unpinned."""
        tiers = self.tiers(resident, pinned, ram, slots)
        return self.ram(tiers), tiers.pinned + tiers.ring if tiers.pinned else 0

    def fits(self, resident: int, slots: int, all_in_ram: bool, limits: Limits) -> bool:
        """Whether so many resident blocks fit the device; on a CPU that is RAM, which then holds the others too."""
        if not self.on_host:
            return self.vram(resident, slots) <= limits.vram_bytes
        end = self.total if all_in_ram else resident
        return self.ram(self.tiers(resident, resident, end, slots)) <= limits.ram_bytes

    def tiers(self, resident: int, pinned: int, ram: int, slots: int) -> Tiers:
        """``pinned`` and ``ram`` are the ranks where pinned blocks and blocks in RAM end."""
        sums, slot_bytes = self.bytes, slots * self.largest_streamed(resident)
        return Tiers(
            gpu=sums[resident],
            pinned=sums[pinned] - sums[resident],
            pageable=sums[ram] - sums[pinned],
            disk=sums[-1] - sums[ram],
            largest_resident=self.sizes[0] if resident else 0,
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

    def ways(self, resident: int, pinned: int, sure: int, ram: int) -> list[Passage]:
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


_RESIDENT = Passage(Way.RESIDENT, 0, 0)


def _sums(values: Iterable[int]) -> list[int]:
    return [0, *accumulate(values)]


def _either(pageable: Passage, disk: Passage) -> Passage:
    """A way that is no slower than either, in each lane."""
    if disk.way is Way.PAGEABLE:  # on a CPU
        return Passage(Way.PAGEABLE, 0, min(pageable.copy_ns, disk.copy_ns))
    copy = min(disk.copy_ns, pageable.copy_ns)
    return Passage(Way.DISK, max(0, min(disk.read_ns, pageable.copy_ns - copy)), copy)
