"""Why a stage's plan is what it is: what was passed over, and what the choice costs. One short sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import Limits, StagePlan
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import format_bytes, format_seconds

HIDDEN_SHARE = 0.02
"""Copies count as hidden where compute waits for them for less than this share of the run."""


def reasons_of(
    chosen: StagePlan,
    candidates: Sequence[StagePlan],
    fitting: Sequence[StagePlan],
    prefer: Preference,
    limits: Limits,
) -> tuple[str, ...]:
    """Sentences about the weight format, the placements and the tiles."""
    return (
        *_formats(chosen, candidates, fitting, prefer, limits),
        *_placements(chosen, fitting, prefer, limits),
        *_tiles(chosen, candidates, limits),
    )


def _formats(
    chosen: StagePlan,
    candidates: Sequence[StagePlan],
    fitting: Sequence[StagePlan],
    prefer: Preference,
    limits: Limits,
) -> Iterator[str]:
    """Each more faithful format that was not taken."""
    kept = [name for name in FORMATS if FORMATS[name].weight_error < chosen.cost.fidelity_error]
    for name in kept:
        if not (others := [stage for stage in candidates if stage.weight_format == name]):
            continue
        if not (within := [stage for stage in fitting if stage.weight_format == name]):
            least = min(others, key=lambda stage: (stage.cost.peak_vram_bytes, stage.cost.peak_ram_bytes))
            yield f"not {name}: {_shortfall(least, limits)}"
        elif prefer == "memory":
            peak = min(within, key=lambda stage: (stage.cost.peak_vram_bytes, stage.cost.peak_ram_bytes))
            yield f"not {name}: {_peak(peak)} against {_peak(chosen)}, prefer memory"
        else:
            quickest = format_seconds(min(stage.cost.time_s for stage in within))
            yield f"not {name}: {quickest} against {format_seconds(chosen.cost.time_s)}, prefer {prefer}"


def _placements(chosen: StagePlan, fitting: Sequence[StagePlan], prefer: Preference, limits: Limits) -> Iterator[str]:
    total, streamed = len(chosen.block_placements), chosen.streamed
    if not total:
        return
    if not streamed:
        yield f"all {total} blocks resident: they fit {_budget(chosen, limits)}"
        return
    size = format_bytes(chosen.cost.slot_bytes // chosen.slots)
    plural = "slots" if chosen.slots > 1 else "slot"
    text = (
        f"{total - streamed} of {total} blocks resident, {streamed} streamed through {chosen.slots} {plural} of {size}"
    )
    if not any(not stage.streamed for stage in fitting):
        yield f"{text}: all resident does not fit {_budget(chosen, limits)}"
    elif prefer == "memory":
        yield f"{text}: prefer memory"
    else:
        yield f"{text}: sooner done than loading all of them first"
    share = chosen.cost.waiting_s / chosen.cost.run_s if chosen.cost.run_s else 0.0
    if share < HIDDEN_SHARE:
        yield "copies hide behind compute"
    else:
        yield f"compute waits {format_seconds(chosen.cost.waiting_s)} ({share:.0%}) for copies"


def _tiles(chosen: StagePlan, candidates: Sequence[StagePlan], limits: Limits) -> Iterator[str]:
    if chosen.stage != "decode":
        return
    untiled = next((stage for stage in candidates if not stage.tile_px), None)
    if not chosen.tile_px:
        yield "untiled: tiles change pixels, and the whole picture fits"
    elif untiled is None:
        yield f"tiles of {chosen.tile_px} px: asked for"
    else:
        yield f"tiles of {chosen.tile_px} px: {_peak(chosen)}, untiled {_peak(untiled)}, {_budget(chosen, limits)}"


def _budget(stage: StagePlan, limits: Limits) -> str:
    if stage.cost.on_host:
        return f"the {format_bytes(limits.ram_bytes)} RAM budget"
    return f"the {format_bytes(limits.vram_bytes)} VRAM budget"


def _peak(stage: StagePlan) -> str:
    if stage.cost.on_host:
        return f"{format_bytes(stage.cost.peak_ram_bytes)} RAM"
    return f"{format_bytes(stage.cost.peak_vram_bytes)} VRAM"


def _shortfall(stage: StagePlan, limits: Limits) -> str:
    if stage.cost.peak_vram_bytes > limits.vram_bytes:
        return f"needs {format_bytes(stage.cost.peak_vram_bytes)} VRAM of {format_bytes(limits.vram_bytes)}"
    if stage.cost.peak_ram_bytes > limits.ram_bytes:
        return f"needs {format_bytes(stage.cost.peak_ram_bytes)} RAM of {format_bytes(limits.ram_bytes)}"
    return (
        f"needs {format_bytes(stage.cost.host_pinned_bytes)} pinned of {format_bytes(limits.pinnable_bytes)} pinnable"
    )
