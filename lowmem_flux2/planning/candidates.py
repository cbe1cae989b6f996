"""Every plan of a stage that is worth pricing: formats x batches x chunks x slots x residency x host tiers, or tiles.

Every number of resident blocks is tried, in one order of residency: more of them shorten a step but lengthen the load,
which a few steps do not repay. The others rest in one of three fills: pinned first, pageable first, or all on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from lowmem_flux2.planning.cost import block_sizes, stage_cost
from lowmem_flux2.planning.formats import FORMATS, PLAIN_FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Limits, Placement, Stage, StagePlan
from lowmem_flux2.planning.selection import Selection, compute_dtype, runs_on
from lowmem_flux2.planning.support import Support
from lowmem_flux2.planning.tiles import TILE_SIDES_PX, tile_is_sound
from lowmem_flux2.planning.workload import Workload

SLOT_COUNTS = (2, 1)
"""With two, one block computes while the next one is copied; a single one halves the memory, and hides nothing."""
CHUNK_TOKENS = (0, 2048, 512)


@dataclass(frozen=True, slots=True)
class Job:
    """All that a stage's candidates depend on."""

    model: ModelSpec
    workload: Workload
    hardware: Hardware
    selection: Selection
    limits: Limits
    support: Support

    def candidates(self, stage: Stage) -> list[StagePlan]:
        """Priced plans of the stage; those that exceed the limits are among them, to say by how much."""
        if stage == "encode":
            return list(_encode(self))
        if stage == "denoise":
            return list(_denoise(self))
        return list(_decode(self))

    def priced(self, stage: StagePlan) -> StagePlan:
        return replace(stage, cost=stage_cost(stage, self.model, self.workload, self.hardware))


def fits(stage: StagePlan, limits: Limits) -> bool:
    """Whether the stage keeps to every budget."""
    cost = stage.cost
    return (
        cost.peak_vram_bytes <= limits.vram_bytes
        and cost.peak_ram_bytes <= limits.ram_bytes
        and pinning_fits(stage, limits)
    )


def pinning_fits(stage: StagePlan, limits: Limits) -> bool:
    """The disk ring alone is no obstacle: unpinned, it is only slower."""
    return not stage.count(Placement.PINNED) or stage.cost.host_pinned_bytes <= limits.pinnable_bytes


def _encode(job: Job) -> Iterator[StagePlan]:
    dtype = compute_dtype(job.selection, job.hardware)
    for name in _formats(job, job.selection.text_weight_format, dtype):
        for batch in _batches(job.workload.num_prompts, 0):
            bare = StagePlan(
                stage="encode",
                component="text_encoder",
                weight_format=name,
                compute_dtype=dtype,
                block_placements=(),
                non_block_placement=Placement.DISK,
                prefetch_depth=0,
                slots=0,
                chunk_tokens=0,
                tile_px=0,
                step_cache="off",
                batch_size=batch,
            )
            yield from _placed(job, (bare,))


def _denoise(job: Job) -> Iterator[StagePlan]:
    dtype = compute_dtype(job.selection, job.hardware)
    chunks = [chunk for chunk in CHUNK_TOKENS if chunk < job.workload.sequence_tokens]
    if not job.support.chunk_tokens:
        chunks = [0]
    for name in _formats(job, job.selection.weight_format, dtype):
        for batch in _batches(job.workload.num_images, job.selection.batch_size):
            bare = StagePlan(
                stage="denoise",
                component="transformer",
                weight_format=name,
                compute_dtype=dtype,
                block_placements=(),
                non_block_placement=Placement.GPU,
                prefetch_depth=0,
                slots=0,
                chunk_tokens=0,
                tile_px=0,
                step_cache="off",
                batch_size=batch,
            )
            yield from _placed(job, [replace(bare, chunk_tokens=chunk) for chunk in chunks])


def _decode(job: Job) -> Iterator[StagePlan]:
    dtype = compute_dtype(job.selection, job.hardware)
    width, height, fixed = job.workload.width, job.workload.height, job.selection.vae_tile
    if fixed == "auto":
        tiles = [0, *(px for px in TILE_SIDES_PX if tile_is_sound(width, height, px))]
    else:
        px = 0 if fixed == "off" else int(fixed)
        tiles = [px if px < max(width, height) else 0]
    for tile in tiles:
        stage = StagePlan(
            stage="decode",
            component="vae",
            weight_format=dtype,
            compute_dtype=dtype,
            block_placements=(),
            non_block_placement=Placement.GPU,
            prefetch_depth=0,
            slots=0,
            chunk_tokens=0,
            tile_px=tile,
            step_cache="off",
            batch_size=1,
        )
        yield job.priced(stage)


def _formats(job: Job, fixed: str, dtype: str) -> list[str]:
    """Formats to try: of the unquantized ones only the compute dtype, since nothing is won by another."""
    names = FORMATS if fixed == "auto" else (fixed,)
    return [
        name
        for name in names
        if name in job.support.weight_formats
        and runs_on(name, job.hardware)
        and (name == dtype or name not in PLAIN_FORMATS)
    ]


def _batches(total: int, fixed: int) -> list[int]:
    """All at once, halves of that, and one by one. A batch's composition decides pixels, so the plan records it."""
    if fixed:
        return [min(fixed, total)]
    sizes = []
    size = total
    while size > 1:
        sizes.append(size)
        size = -(-size // 2)
    return [*sizes, 1]


# -------------------------------------------------------------------------------------------------- placements


def _placed(job: Job, variants: Sequence[StagePlan]) -> Iterator[StagePlan]:
    """Each variant with all blocks resident, or streamed through each number of slots.

    The variants come in order of activations. Smaller chunks and fewer slots only save memory, so beside an earlier
    variant they are worth trying with more residents than that one holds, and with none.
    """
    total = len(block_sizes(variants[0], job.model))
    if job.selection.placement in ("auto", "resident"):
        yield from (job.priced(replace(bare, block_placements=(Placement.GPU,) * total)) for bare in variants)
    if job.selection.placement == "resident":
        return
    held = dict.fromkeys(SLOT_COUNTS, -1)
    for bare in variants:
        for slots in SLOT_COUNTS:
            beyond = max(most for others, most in held.items() if others >= slots)
            most = yield from _streamed(job, replace(bare, slots=slots, prefetch_depth=slots - 1), beyond)
            held[slots] = max(held[slots], most)


def _streamed(job: Job, bare: StagePlan, beyond: int) -> Generator[StagePlan, None, int]:
    """More than ``beyond`` resident blocks, up to as many as fit, and none; the others in each host fill.

    Returns:
        The most resident blocks that fit, short of all; negative where streaming makes no sense.
    """
    sizes = block_sizes(bare, job.model)
    total = len(sizes)
    order = _residency_order(sizes)

    def placed(resident: int, rest: Sequence[Placement]) -> StagePlan:
        """``rest`` are the placements of order[resident:]."""
        placements = [Placement.GPU] * total
        for index, placement in zip(order[resident:], rest, strict=True):
            placements[index] = placement
        return job.priced(replace(bare, block_placements=tuple(placements)))

    def uniform(resident: int, tier: Placement) -> StagePlan:
        return placed(resident, [tier] * (total - resident))

    fixed = job.selection.placement
    # On a CPU a copy of a block in RAM wins nothing over the file.
    last = Placement(fixed) if fixed != "auto" else Placement.DISK
    # With no more blocks than slots, streaming takes the memory of residency: only a fixed placement asks for that.
    least = bare.slots + (fixed == "auto")
    # All in one arena: what weights pass through on their way is not needed beside it, or is the arena itself.
    free = job.limits.ram_bytes - (uniform(0, Placement.PAGEABLE).cost.host_bytes - sum(sizes))
    most = _most_resident(job, total - least, lambda resident: uniform(resident, last))
    for resident in dict.fromkeys((*range(most, beyond, -1), *((0,) if most >= 0 else ()))):
        slowest = uniform(resident, last)
        yield slowest
        if fixed == "auto" and job.hardware.device == "cuda":
            left = [sizes[index] for index in order[resident:]]
            fills = dict.fromkeys(_fills(left, free, slowest.cost.host_pinned_bytes, job.limits.pinnable_bytes))
            yield from (placed(resident, fill) for fill in fills if set(fill) != {Placement.DISK})
    return most


def _most_resident(job: Job, high: int, with_resident: Callable[[int], StagePlan]) -> int:
    """The largest number of resident blocks up to ``high`` that the device's memory holds; negative where high is."""
    low = min(0, high)
    while low < high:
        middle = (low + high + 1) // 2
        cost = with_resident(middle).cost
        if cost.peak_vram_bytes <= job.limits.vram_bytes and (
            not cost.on_host or cost.peak_ram_bytes <= job.limits.ram_bytes
        ):
            low = middle
        else:
            high = middle - 1
    return low


def _residency_order(sizes: Sequence[int]) -> list[int]:
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
    return order


def _fills(
    sizes: Sequence[int], free_bytes: int, ring_bytes: int, pinnable_bytes: int
) -> Iterator[tuple[Placement, ...]]:
    """Pinned as far as it may be, then pageable, then disk; and the same without pinning, whose load is shorter.

    Args:
        free_bytes: RAM for arenas and the disk ring together.
        ring_bytes: the ring that any disk block needs.
    """
    for pinnable in (pinnable_bytes, 0):
        fill = _filled(sizes, free_bytes, pinnable)
        if Placement.DISK in fill:  # then the ring is needed, which takes of both
            fill = _filled(sizes, free_bytes - ring_bytes, pinnable - ring_bytes)
        yield fill


def _filled(sizes: Sequence[int], free_bytes: int, pinnable_bytes: int) -> tuple[Placement, ...]:
    """One placement per size, in order: the fastest tier with room for it."""
    placements = []
    for size in sizes:
        if size <= min(free_bytes, pinnable_bytes):
            placements.append(Placement.PINNED)
            pinnable_bytes -= size
            free_bytes -= size
        elif size <= free_bytes:
            placements.append(Placement.PAGEABLE)
            free_bytes -= size
        else:
            placements.append(Placement.DISK)
    return tuple(placements)
