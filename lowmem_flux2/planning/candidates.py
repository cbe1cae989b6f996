"""All that a stage could be: formats x batches x chunks x step caches, to be placed by ``search``; or VAE tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.flops import compute_rate, linear_rate
from lowmem_flux2.planning.formats import FORMATS, GGUF, PLAIN_FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import time_then_effort, time_then_effort_of
from lowmem_flux2.planning.plan import ONE_BY_ONE, Limits, Placement, Stage, StagePlan
from lowmem_flux2.planning.residency import Least, TieredBlocks, Variant
from lowmem_flux2.planning.search import Search, cuts
from lowmem_flux2.planning.selection import Selection, StreamFrom, compute_dtype, runs_on
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.step_caches import AUTO, OFF, automatic, step_cache_text
from lowmem_flux2.planning.support import Support
from lowmem_flux2.planning.tiles import TILE_SIDES_PX, tiles_are_sound
from lowmem_flux2.planning.workload import Workload

CHUNK_TOKENS = (0, 2048, 512)

Family = tuple[Variant, ...]
"""Variants that differ in their chunks alone, the largest chunks first."""


def _least(blocks: TieredBlocks, placement: StreamFrom) -> Iterator[Least]:
    for slots, others, numbers in cuts(blocks, placement):
        if slots > 1 or (slots and others == "ram" and placement == "auto"):
            continue  # one slot needs least; its ring is never larger than the blocks that need not rest in RAM
        for resident in numbers:
            end = blocks.total if others == "ram" else resident
            pinned = end if placement == "pinned" else resident
            yield Least(blocks.vram(resident, slots), *blocks.ram_and_pinned(resident, pinned, end, slots))


@dataclass(frozen=True, slots=True)
class Job:
    """All that a stage's candidates depend on; ``cached_batches`` are prompts that need not be encoded."""

    model: ModelSpec
    workload: Workload
    hardware: Hardware
    selection: Selection
    limits: Limits
    support: Support
    cached_batches: int = 0
    _families: dict[Stage, list[Family]] = field(default_factory=dict, compare=False, repr=False)

    def families(self, stage: Stage) -> list[Family]:
        """Every variant of encode or denoise that ``support`` runs, most faithful formats first."""
        if stage not in self._families:
            self._families[stage] = self._all_families(stage)
        return self._families[stage]

    def _all_families(self, stage: Stage) -> list[Family]:
        selection, dtype = self.selection, compute_dtype(self.selection, self.hardware)
        if stage == "denoise":
            fixed, chunks, caches = selection.weight_format, self._chunks(), self._step_caches()
            batches = _batches(self.workload.num_images, selection.batch_size)
        else:
            fixed, chunks, caches = selection.text_weight_format, [0], ["off"]
            batches = _batches(self.workload.num_prompts, 0)
        if stage == "upsample":  # all prompts together, as the stock pipeline
            batches = [self.workload.num_prompts]
        cached = self.cached_batches if stage == "encode" else 0
        bares = [
            replace(StagePlan.bare(stage, name, dtype), step_cache=cache, batch_size=batch, cached_batches=cached)
            for name in _formats(self, stage, fixed, dtype)
            for cache in caches
            for batch in batches
        ]
        return [tuple(self._variant(replace(bare, chunk_tokens=chunk)) for chunk in chunks) for bare in bares]

    def tilings(self, stage: Stage) -> list[StagePlan]:
        """A stage of the VAE untiled, and in each tile that leaves no sliver; or as the user fixed it. Priced."""
        dtype = compute_dtype(self.selection, self.hardware)
        work, fixed = self.workload, self.selection.vae_tile
        sizes = work.references if stage == "reference" else ((work.width, work.height),)
        largest = max(side for size in sizes for side in size)
        if fixed == "auto":
            tiles = [0, *(px for px in TILE_SIDES_PX if px < largest and tiles_are_sound(sizes, px))]
        else:
            px = 0 if fixed == "off" else int(fixed)
            tiles = [px if px < largest else 0]
        return [self.priced(replace(StagePlan.bare(stage, dtype, dtype), tile_px=tile)) for tile in tiles]

    def best(self, stage: Stage, accept: Callable[[StagePlan], bool]) -> StagePlan | None:
        """The fastest plan that fits, priced, among the variants that ``accept`` takes; None where none fits."""
        if stage in ONE_BY_ONE:
            fitting = [
                candidate for candidate in self.tilings(stage) if accept(candidate) and fits(candidate, self.limits)
            ]
            return min(fitting, key=time_then_effort_of, default=None)
        families = [[variant for variant in family if accept(variant.bare)] for family in self.families(stage)]
        found = Search(filter(None, families), self.selection.placement, self.limits, time_then_effort).run()
        return None if found is None else self.priced(found)

    def within(self, most_bytes: int, resource: Literal["device", "host"] = "device") -> Job:
        """The job with no more memory than this of the compute device, which is RAM on a CPU, or of the host."""
        field = "vram_bytes" if resource == "device" and self.hardware.device == "cuda" else "ram_bytes"
        capped = min(most_bytes, getattr(self.limits, field))
        return replace(self, limits=replace(self.limits, **{field: capped}))

    def priced(self, stage: StagePlan) -> StagePlan:
        return replace(stage, cost=stage_cost(stage, self.model, self.workload, self.hardware))

    def least(self, stage: Stage, families: Sequence[Family] | None = None) -> Iterator[Least]:
        """What each variant needs at the least at each number of residents, whether or not that is there."""
        if stage in ONE_BY_ONE:
            for candidate in self.tilings(stage):
                yield Least(candidate.cost.peak_vram_bytes, candidate.cost.peak_ram_bytes, 0)
            return
        for variant in (variant for family in families or self.families(stage) for variant in family):
            placement = self.selection.placement
            if placement not in variant.needs:  # asked for some times in a plan
                variant.needs[placement] = list(_least(variant.blocks, placement))
            yield from variant.needs[placement]

    def _variant(self, bare: StagePlan) -> Variant:
        return Variant(bare, stage_work(bare, self.model, self.workload, self.hardware), self.hardware)

    def _chunks(self) -> list[int]:
        return [chunk for chunk in CHUNK_TOKENS if 2 * chunk <= self.workload.sequence_tokens]

    def _step_caches(self) -> list[str]:
        """Off first, then those that the preference may take."""
        fixed = self.selection.step_cache
        if fixed != AUTO:
            return [step_cache_text(fixed)]
        caches, _ = automatic(self.model, self.workload, self.selection.prefer)
        return [OFF, *(str(cache) for cache in caches)]


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


def _formats(job: Job, stage: Stage, fixed: str, dtype: str) -> list[str]:
    """Formats to try: of the unquantized ones only the compute dtype, and none that another beats in every respect.

    One that computes in its own class is there to be faster: for denoising, where speed is preferred and it is. A text
    encoder runs once, and a language model's inputs have the outliers that such formats round worst.

    Raises:
        UsageError: the checkpoint's own quantized blocks are asked for, and it has none.
    """
    packed_of = {"denoise": job.model.transformer.packed, "encode": job.model.text_encoder.packed}
    has_packed = bool(packed_of.get(stage))
    if fixed == GGUF and not has_packed:
        part = "transformer" if stage == "denoise" else "text encoder"
        raise UsageError(f"weight format {GGUF}: the {part} of {job.model.name} is not a GGUF file")
    names = [
        name
        for name in (FORMATS if fixed == "auto" else (fixed,))
        if name in job.support.weight_formats
        and (name != GGUF or has_packed)
        and runs_on(name, job.hardware)
        and (name == dtype or name not in PLAIN_FORMATS)
    ]
    if fixed == "auto":
        names = [name for name in names if not FORMATS[name].compute_class or _is_worth_it(name, job, stage, dtype)]
    return [name for name in names if not any(_beats(other, name) for other in names)]


def _is_worth_it(name: str, job: Job, stage: Stage, dtype: str) -> bool:
    plain = compute_rate(job.hardware, dtype)
    return (
        stage == "denoise"
        and job.selection.prefer == "speed"
        and (linear_rate(job.hardware, dtype, FORMATS[name]) > plain)
    )


SAME_BYTES = 1.001


def _beats(one: str, other: str) -> bool:
    """Whether a format is more faithful in as many bytes, to a thousandth, stored and transient.

    So int8 (with its scales) beats fp8, and nf4 beats int4: these are planned only where the user asks for them.
    """
    mine, its = FORMATS[one], FORMATS[other]
    return (
        mine.weight_error < its.weight_error
        and mine.compute_class == its.compute_class
        and mine.bytes_per_weight <= SAME_BYTES * its.bytes_per_weight
        and mine.scratch_bytes_per_weight <= its.scratch_bytes_per_weight
    )


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
