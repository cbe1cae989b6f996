"""What could have been planned instead: the front of peak memory against time against fidelity, and the neighbours.

Worked out when asked for, from a plan that is made: choosing one needs neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import effort, fidelity_error, time_then_effort
from lowmem_flux2.planning.plan import ONE_BY_ONE, Placement, Plan, Stage, StagePlan, stages_of
from lowmem_flux2.planning.planner import options_of
from lowmem_flux2.planning.reasons import peak, shortfall_of
from lowmem_flux2.planning.residency import residency_order
from lowmem_flux2.planning.search import SLOT_COUNTS
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.units import format_bytes, format_seconds

FRONT_STEPS = 8
"""The front is drawn in steps of this part of the memory budget."""
SAME_TIME = 0.002
"""Times that differ by less are called the same."""


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A run that no other beats in peak memory of the compute device, time and fidelity at once.

    ``weight_format`` is the transformer's; ``resident`` and ``streamed`` count its blocks.
    """

    peak_vram_bytes: int
    peak_ram_bytes: int
    time_s: float
    fidelity_error: float
    weight_format: str
    text_weight_format: str
    resident: int
    streamed: int
    tile_px: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A neighbour of a stage's plan, and why it was not taken."""

    stage: Stage
    change: str
    why: str
    fits: bool
    peak_vram_bytes: int
    peak_ram_bytes: int
    time_s: float
    fidelity_error: float


@dataclass(frozen=True, slots=True)
class Alternatives:
    front: tuple[FrontPoint, ...]
    rejected: tuple[Rejected, ...]

    def to_json(self) -> dict[str, Any]:
        """Keys beside those of the plan; ``Plan.from_json`` passes over them."""
        return {
            "pareto": [asdict(point) for point in self.front],
            "rejected": [asdict(neighbour) for neighbour in self.rejected],
        }


def shown(found: Alternatives) -> RenderableType:
    """Two tables: the front, and the neighbours."""
    front = Table(title="nothing beats these in peak memory, time and fidelity at once", title_justify="left", box=None)
    for heading in ("peak VRAM", "peak RAM", "time", "error", "transformer", "text encoder", "resident/streamed"):
        front.add_column(heading, justify="left" if heading in ("transformer", "text encoder") else "right")
    for point in found.front:
        front.add_row(
            format_bytes(point.peak_vram_bytes),
            format_bytes(point.peak_ram_bytes),
            format_seconds(point.time_s),
            f"{point.fidelity_error:.2g}",
            point.weight_format,
            point.text_weight_format,
            f"{point.resident}/{point.streamed}",
        )
    others = Table(title="not taken", title_justify="left", box=None)
    for heading in ("stage", "change", "why not"):
        others.add_column(heading)
    for neighbour in found.rejected:
        others.add_row(neighbour.stage, neighbour.change, neighbour.why)
    return Group(Text(), front, Text(), others)


def alternatives_of(plan: Plan, model: ModelSpec, selection: Selection, support: Support = SUPPORTED) -> Alternatives:
    """Of a plan just made with this selection."""
    job = Job(model, plan.workload, plan.hardware, selection, plan.limits, support)
    rejected = [neighbour for stage in plan.stages for neighbour in _rejected(stage, job)]
    fast = replace(job, selection=replace(selection, prefer="speed"), _families={})  # formats for speed alone count too
    return Alternatives(tuple(_front(fast)), tuple(rejected))


# -------------------------------------------------------------------------------------------------------- the front


def _front(job: Job) -> Iterator[FrontPoint]:
    """Over all formats: for each peak the fastest run, of those that nothing beats; highest peak first."""
    step = max(_budget(job) // FRONT_STEPS, 1)
    stages = {name: _stage_fronts(job, name, step) for name in stages_of(job.workload)}
    points = []
    for fronts in product(*stages.values()):
        for cap in sorted({_peak(stage) for front in fronts for stage in front}):
            run = [min((stage for stage in front if _peak(stage) <= cap), key=_time, default=None) for front in fronts]
            if None not in run:
                points.append(_point([stage for stage in run if stage is not None]))
    on_host = job.hardware.device == "cpu"
    keys = {
        (point.peak_ram_bytes if on_host else point.peak_vram_bytes, point.time_s, point.fidelity_error): point
        for point in points
    }
    for key, point in sorted(keys.items(), reverse=True):
        beaten = (other for other in keys if other != key and all(a <= b for a, b in zip(other, key, strict=True)))
        if next(beaten, None) is None:
            yield point


def _stage_fronts(job: Job, name: Stage, step: int) -> list[list[StagePlan]]:
    """For each fidelity of a stage, its plans from the fastest down to the least memory.

    Of a coarser one, those alone that are faster by more than ``SAME_TIME``, or take less memory, than all finer ones.
    """
    if name in ONE_BY_ONE:
        return [[stage for stage in job.tilings(name) if fits(stage, job.limits)]]
    fronts: list[list[StagePlan]] = []
    known: list[tuple[int, int]] = []
    for option in options_of(job, name, time_then_effort):
        fronts.append([job.priced(stage) for stage in option.search.front(step, known)])
        known += [(_beaten(stage), _peak(stage)) for stage in fronts[-1]]
    if name == "upsample":  # whose fidelity is no picture's: one front of all formats
        return [[stage for front in fronts for stage in front]]
    return fronts


def _beaten(stage: StagePlan) -> int:
    """The least value that is no faster than this plan by more than ``SAME_TIME``."""
    return time_then_effort(round(1e9 * stage.cost.time_s * (1 - SAME_TIME)), 0, 0, 0)


def _point(stages: Sequence[StagePlan]) -> FrontPoint:
    encode, *_, denoise, decode = pictures = [stage for stage in stages if stage.stage != "upsample"]
    return FrontPoint(
        peak_vram_bytes=max(stage.cost.peak_vram_bytes for stage in stages),
        peak_ram_bytes=max(stage.cost.peak_ram_bytes for stage in stages),
        time_s=sum(stage.cost.time_s for stage in stages),
        fidelity_error=fidelity_error([stage.cost.fidelity_error for stage in pictures]),
        weight_format=denoise.weight_format,
        text_weight_format=encode.weight_format,
        resident=denoise.count(Placement.GPU),
        streamed=denoise.streamed,
        tile_px=decode.tile_px,
    )


def _budget(job: Job) -> int:
    return job.limits.ram_bytes if job.hardware.device == "cpu" else job.limits.vram_bytes


def _peak(stage: StagePlan) -> int:
    return stage.cost.peak_ram_bytes if stage.cost.on_host else stage.cost.peak_vram_bytes


def _time(stage: StagePlan) -> float:
    return stage.cost.time_s


# --------------------------------------------------------------------------------------------------- the neighbours


def _rejected(chosen: StagePlan, job: Job) -> Iterator[Rejected]:
    for change, bare in (*_other_formats(chosen, job), *_neighbours(chosen, job)):
        other = job.priced(bare)
        cost = other.cost
        yield Rejected(
            stage=chosen.stage,
            change=change,
            why=_why(chosen, other, job),
            fits=fits(other, job.limits),
            peak_vram_bytes=cost.peak_vram_bytes,
            peak_ram_bytes=cost.peak_ram_bytes,
            time_s=cost.time_s,
            fidelity_error=cost.fidelity_error,
        )


def _why(chosen: StagePlan, other: StagePlan, job: Job) -> str:
    """The first of these that holds: it does not fit, is coarser, slower, moves more, takes more, or only is other."""
    mine, its = chosen.cost, other.cost
    if not fits(other, job.limits):
        return shortfall_of(other, job.limits)
    saved = mine.time_s - its.time_s
    if its.fidelity_error > mine.fidelity_error:
        times = f"{format_seconds(its.time_s)} against {format_seconds(mine.time_s)}"
        return f"error {its.fidelity_error:.2g} against {mine.fidelity_error:.2g}, {times}"
    if saved < -SAME_TIME * mine.time_s:
        return f"slower: {format_seconds(its.time_s)} against {format_seconds(mine.time_s)}"
    quick = "as fast" if saved < SAME_TIME * mine.time_s else f"{format_seconds(saved)} faster"
    for verb, ours, theirs in (("reads", mine.disk_bytes, its.disk_bytes), ("copies", mine.h2d_bytes, its.h2d_bytes)):
        if theirs > ours:
            return f"{quick}, but {verb} {format_bytes(theirs - ours)} more"
    if _peak(other) > _peak(chosen):
        return f"{quick}, and takes {peak(other)}, not {peak(chosen)}"
    if its.peak_ram_bytes > mine.peak_ram_bytes:
        return f"{quick}, and takes {format_bytes(its.peak_ram_bytes - mine.peak_ram_bytes)} more RAM"
    return f"{quick}: nothing won by it"


def _other_formats(chosen: StagePlan, job: Job) -> Iterator[tuple[str, StagePlan]]:
    """The best in the next better and the next coarser format; of what does not fit, what needs least."""
    if chosen.stage in ONE_BY_ONE:
        return
    options = options_of(job, chosen.stage, effort)
    names = [option.weight_format for option in options]
    at = names.index(chosen.weight_format) if chosen.weight_format in names else 0
    for option in (*options[:at][-1:], *options[at + 1 :][:1]):
        found = option.search.run()
        if found is None:
            family = next(
                each for each in job.families(chosen.stage) if each[0].bare.weight_format == option.weight_format
            )
            bare = family[-1].bare
            blocks = len(chosen.block_placements)
            found = replace(bare, block_placements=(Placement.DISK,) * blocks, slots=1)
        yield f"{option.weight_format} weights", found


def _neighbours(chosen: StagePlan, job: Job) -> Iterator[tuple[str, StagePlan]]:
    """The same in one thing other: a tier, a slot, the chunks, the batch, the tiles."""
    if chosen.stage in ONE_BY_ONE:
        tiles = [stage.tile_px for stage in job.tilings(chosen.stage)]
        at = tiles.index(chosen.tile_px)
        for px in (*tiles[:at][-1:], *tiles[at + 1 :][:1]):
            yield (f"tiles of {px} px" if px else "untiled"), replace(chosen, tile_px=px)
        return
    yield from _other_tiers(chosen, job)
    counts = sorted(SLOT_COUNTS)
    for slots in (chosen.slots - 1, chosen.slots + 1) if chosen.streamed else ():
        if slots in counts and slots < chosen.streamed:
            plural = "s" if slots > 1 else ""
            yield f"{slots} slot{plural}", replace(chosen, slots=slots, prefetch_depth=slots - 1)
    mine = [bare for bare in _bares(job, chosen.stage) if bare.weight_format == chosen.weight_format]
    for field, words in (("chunk_tokens", "chunks of {} tokens"), ("batch_size", "batches of {}")):
        values = sorted({getattr(bare, field) for bare in mine}, reverse=True)
        at = values.index(getattr(chosen, field))
        for value in (*values[:at][-1:], *values[at + 1 :][:1]):
            yield words.format(value) if value else "no chunks", replace(chosen, **{field: value})


def _bares(job: Job, stage: Stage) -> list[StagePlan]:
    return [variant.bare for family in job.families(stage) for variant in family]


def _other_tiers(chosen: StagePlan, job: Job) -> Iterator[tuple[str, StagePlan]]:
    """One more block in each faster tier, one resident fewer; all pinned blocks pageable."""
    placements = chosen.block_placements
    order = residency_order(tuple(block_sizes(chosen, job.model)))
    resident = [index for index in order if placements[index] is Placement.GPU]
    streamed = [index for index in order if placements[index] is not Placement.GPU]
    on_disk = [index for index in streamed if placements[index] is Placement.DISK]

    def moved(index: int, placement: Placement) -> StagePlan:
        others = (*placements[:index], placement, *placements[index + 1 :])
        slots = min(chosen.slots, sum(1 for other in others if other is not Placement.GPU))
        return replace(chosen, block_placements=others, slots=slots, prefetch_depth=max(slots - 1, 0))

    if streamed:
        yield "one more block resident", moved(streamed[0], Placement.GPU)
        yield (
            "all blocks resident",
            replace(chosen, block_placements=(Placement.GPU,) * len(placements), slots=0, prefetch_depth=0),
        )
    if resident and streamed:
        yield "one block fewer resident", moved(resident[-1], placements[streamed[-1]])
    if on_disk and job.hardware.device == "cuda":
        yield "one more block in RAM", moved(on_disk[0], Placement.PAGEABLE)
    if Placement.PINNED in placements:
        unpinned = tuple(Placement.PAGEABLE if each is Placement.PINNED else each for each in placements)
        yield "nothing pinned", replace(chosen, block_placements=unpinned)
    elif Placement.PAGEABLE in placements:
        yield "one block pinned", moved(placements.index(Placement.PAGEABLE), Placement.PINNED)
