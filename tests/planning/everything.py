"""Every plan of a stage that is in the running, one by one: what the search's result is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowmem_flux2.planning.candidates import Job
from lowmem_flux2.planning.plan import Placement, Stage, StagePlan
from lowmem_flux2.planning.residency import residency_order, spread_order
from lowmem_flux2.planning.search import SLOT_COUNTS, SPREAD_SLOTS
from lowmem_flux2.planning.selection import StreamFrom

GPU, PINNED, PAGEABLE, DISK = Placement


def everything(job: Job, stage: Stage = "denoise") -> Iterator[StagePlan]:
    """Every plan in the running, priced by the cost model alone."""
    fixed, on_host = job.selection.placement, job.hardware.device == "cpu"
    for family in job.families(stage):
        for variant in family:
            n = len(variant.work.block_bytes)
            if fixed in ("auto", "resident"):
                yield job.priced(replace(variant.bare, block_placements=(GPU,) * n))
            for slots in SLOT_COUNTS:
                for resident in range(n - slots + (fixed != "auto")):
                    for in_ram in range(n - resident + 1):
                        for pinned in range(in_ram + 1):
                            if not allowed(fixed, on_host, n - resident, in_ram, pinned):
                                continue
                            bare = replace(variant.bare, slots=slots, prefetch_depth=slots - 1)
                            for order in orders(variant.work.block_bytes, fixed, on_host, slots, n - resident - in_ram):
                                placements = [DISK] * n
                                for rank, index in enumerate(order[: resident + in_ram]):
                                    is_pinned = rank < resident + pinned
                                    placements[index] = GPU if rank < resident else PINNED if is_pinned else PAGEABLE
                                yield job.priced(replace(bare, block_placements=tuple(placements)))


def orders(sizes: tuple[int, ...], fixed: StreamFrom, on_host: bool, slots: int, on_disk: int) -> list[tuple[int, ...]]:
    """The spread order is tried beside the residency order where the disk has a part in each step."""
    has_choice = fixed == "auto" and not on_host and on_disk > 0 and slots in SPREAD_SLOTS
    return [residency_order(sizes), *([spread_order(sizes)] if has_choice else [])]


def allowed(fixed: StreamFrom, on_host: bool, streamed: int, in_ram: int, pinned: int) -> bool:
    if fixed == "pinned":
        return pinned == streamed
    if fixed == "pageable":
        return (in_ram, pinned) == (streamed, 0)
    if fixed == "resident":
        return False
    return in_ram == 0 if fixed == "disk" or on_host else True
