"""Why a stage's plan is what it is: what was passed over, and what the choice costs. One short sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import ONE_BY_ONE, Limits, Placement, StagePlan
from lowmem_flux2.planning.residency import Least
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.step_caches import AUTO, FirstBlock, automatic, fidelity_of_cache, parse_step_cache
from lowmem_flux2.planning.waits import steady_round
from lowmem_flux2.units import format_bytes, format_seconds

HIDDEN_SHARE = 0.02
"""Copies count as hidden where compute waits for them for less than this share of the run."""


class Finer(NamedTuple):
    """The next more faithful format that fits, and the time of the best plan in it, or less than that."""

    weight_format: str
    time_s: float
    is_exact: bool


def reasons_of(chosen: StagePlan, job: Job, finer: Finer | None) -> tuple[str, ...]:
    """Sentences about the weight format, the placements, the step cache, the token chunks and the tiles."""
    words = (_placements(chosen, job), _step_cache(chosen, job), _chunks(chosen, job), _tiles(chosen, job))
    return (*_formats(chosen, job, finer), *(word for part in words for word in part))


def _formats(chosen: StagePlan, job: Job, finer: Finer | None) -> Iterator[str]:
    """Each more faithful format that does not fit, and the next one that does; where memory decides, all that fit."""
    if chosen.stage in ONE_BY_ONE:
        return
    prefer = job.selection.prefer
    larger: dict[str, str] = {}
    for name in dict.fromkeys(family[0].bare.weight_format for family in job.families(chosen.stage)):
        if FORMATS[name].weight_error >= FORMATS[chosen.weight_format].weight_error:
            continue
        families = [family for family in job.families(chosen.stage) if family[0].bare.weight_format == name]
        if not any(need.fits(job.limits) for need in job.least(chosen.stage, families)):
            closest = min(job.least(chosen.stage, families), key=lambda need: need.beyond(job.limits))
            yield f"not {name}: {shortfall(closest, job.limits)}"
        elif prefer == "memory":
            vram, ram, _ = min(need for need in job.least(chosen.stage, families) if need.fits(job.limits))
            larger[name] = format_bytes(ram if chosen.cost.on_host else vram)
        elif finer is not None and finer.weight_format == name:
            least = "" if finer.is_exact else "no less than "
            times = f"{least}{format_seconds(finer.time_s)} against {format_seconds(chosen.cost.time_s)}"
            yield f"not {name}: {times}, prefer {prefer}"
    if larger:
        yield f"not {', '.join(larger)}: {', '.join(larger.values())} against {peak(chosen)}, prefer memory"


def _placements(chosen: StagePlan, job: Job) -> Iterator[str]:
    total, streamed = len(chosen.block_placements), chosen.streamed
    if not total:
        return
    if not streamed:
        yield f"all {total} blocks resident: they fit {_budget(chosen, job.limits)}"
        return
    size = format_bytes(chosen.cost.slot_bytes // chosen.slots)
    plural = "slots" if chosen.slots > 1 else "slot"
    text = (
        f"{total - streamed} of {total} blocks resident, {streamed} streamed through {chosen.slots} {plural} of {size}"
    )
    whole = job.priced(replace(chosen, block_placements=(Placement.GPU,) * total, slots=0, prefetch_depth=0))
    if not fits(whole, job.limits):
        yield f"{text}: not all fit {_budget(chosen, job.limits)}"
    elif job.selection.prefer == "memory":
        yield f"{text}: prefer memory"
    elif job.selection.placement != "auto":
        yield f"{text}: asked for"
    else:
        yield f"{text}: sooner done than loading all of them first"
    share = chosen.cost.waiting_s / chosen.cost.run_s if chosen.cost.run_s else 0.0
    if share < HIDDEN_SHARE:
        yield "copies hide behind compute"
    else:
        waits = format_seconds(chosen.cost.waiting_s)
        work = stage_work(chosen, job.model, job.workload, job.hardware)
        for_whom = next(iter(steady_round(chosen, work, job.hardware).waits_ns), "copies")
        yield f"compute waits {waits} ({share:.0%}), most for {for_whom}"


def _step_cache(chosen: StagePlan, job: Job) -> Iterator[str]:
    if chosen.stage != "denoise":
        return
    cache, steps = parse_step_cache(chosen.step_cache), job.workload.steps
    if cache is None:
        _, why = automatic(job.model, job.workload, job.selection.prefer)
        if why and job.selection.step_cache == AUTO:
            yield f"no step cache: {why}"
        return
    computed = cache.computed_steps(steps)
    if computed == steps:
        yield f"step cache {cache.kind}: skips none of {steps} steps"
        return
    assumed = ", as is assumed" if isinstance(cache, FirstBlock) else ""
    error, provenance = fidelity_of_cache(cache, steps)
    yield f"step cache {cache} computes {computed} of {steps} steps{assumed}; error {error:.2g}, {provenance}"


def _chunks(chosen: StagePlan, job: Job) -> Iterator[str]:
    if not chosen.chunk_tokens:
        return
    whole = job.priced(replace(chosen, chunk_tokens=0)).cost.activation_bytes
    live = format_bytes(chosen.cost.activation_bytes)
    words = f"chunks of {chosen.chunk_tokens} tokens: activations of {live} against {format_bytes(whole)} in one piece"
    if not chosen.cost.on_host:
        yield f"{words}; a GPU may round differently (not measured)"
    elif chosen.compute_dtype == "bf16":
        yield f"{words}; with AMX bf16 rounds differently, median PSNR 56 dB on shapes"
    else:
        yield words


def _tiles(chosen: StagePlan, job: Job) -> Iterator[str]:
    if chosen.stage not in ONE_BY_ONE:
        return
    if not chosen.tile_px:
        what = "each whole picture" if chosen.stage == "reference" else "the whole picture"
        yield f"untiled: tiles change pixels, and {what} fits"
    elif job.selection.vae_tile != "auto":
        yield f"tiles of {chosen.tile_px} px: asked for"
    else:
        untiled = job.priced(replace(chosen, tile_px=0))
        budget = _budget(chosen, job.limits)
        yield f"tiles of {chosen.tile_px} px: {peak(chosen)}, untiled {peak(untiled)}, {budget}"


def _budget(stage: StagePlan, limits: Limits) -> str:
    if stage.cost.on_host:
        return f"the {format_bytes(limits.ram_bytes)} RAM budget"
    return f"the {format_bytes(limits.vram_bytes)} VRAM budget"


def peak(stage: StagePlan) -> str:
    """The stage's peak on the compute device, in words."""
    if stage.cost.on_host:
        return f"{format_bytes(stage.cost.peak_ram_bytes)} RAM"
    return f"{format_bytes(stage.cost.peak_vram_bytes)} VRAM"


def shortfall_of(stage: StagePlan, limits: Limits) -> str:
    """What of a stage that does not fit is not there, in words."""
    cost = stage.cost
    return shortfall(Least(cost.peak_vram_bytes, cost.peak_ram_bytes, cost.host_pinned_bytes), limits)


def shortfall(need: Least, limits: Limits) -> str:
    """What of it is not there, in words."""
    if need.vram > limits.vram_bytes:
        return f"needs {format_bytes(need.vram)} VRAM of {format_bytes(limits.vram_bytes)}"
    if need.ram > limits.ram_bytes:
        return f"needs {format_bytes(need.ram)} RAM of {format_bytes(limits.ram_bytes)}"
    return f"needs {format_bytes(need.pinned)} pinned of {format_bytes(limits.pinnable_bytes)} pinnable"
