"""The recovery ladder: after a stage ran out of memory, the plan with the next lower peak.

Weights keep their format and a batch its composition, so that what has been computed stays right. First come fewer
resident blocks and fewer slots, which change no pixel; then smaller token chunks, which change none where matmul
kernels treat rows alike, and smaller VAE tiles, which change pixels slightly. A smaller weight format changes the
picture: it comes last, and only where the user allowed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Literal

from lowmem_flux2.planning.candidates import Job
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, Stage, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.units import format_bytes

RUNG_SHARE = 0.1
"""A rung lowers the peak by a tenth where it can: less would climb for ever, each rung loads the weights again."""


Resource = Literal["device", "host"]
"""Whose memory ran out. On a CPU both are RAM."""


def next_rung(
    plan: Plan, name: Stage, model: ModelSpec, support: Support = SUPPORTED, resource: Resource = "device"
) -> Plan | None:
    """The same plan with this stage on the next lower rung of what ran out; None on the last one."""
    current = plan.stage(name)

    def alike(stage: StagePlan) -> bool:
        return (stage.weight_format, stage.batch_size) == (current.weight_format, current.batch_size)

    def same_chunks(stage: StagePlan) -> bool:
        return alike(stage) and stage.chunk_tokens == current.chunk_tokens

    def smaller_chunks(stage: StagePlan) -> bool:
        return alike(stage) and _chunk(stage) < _chunk(current)

    job = _job(plan, current, current.weight_format, model, support)
    return _lowered(plan, current, job, (same_chunks, smaller_chunks), resource)


def next_format(
    plan: Plan, name: Stage, model: ModelSpec, support: Support = SUPPORTED, resource: Resource = "device"
) -> Plan | None:
    """The plan with this stage in the most faithful smaller weight format that has a lower peak, for when no rung is
    left; None where there is none. Formats that compute in their own class are there for speed, and no rung.
    """
    current = plan.stage(name)
    now = FORMATS[current.weight_format]
    smaller = [name for name, fmt in FORMATS.items() if fmt.weight_error > now.weight_error and not fmt.compute_class]
    for fmt in sorted(smaller, key=lambda fmt: FORMATS[fmt].weight_error):
        job = _job(plan, current, fmt, model, support)
        lower = _lowered(plan, current, job, (lambda stage: stage.batch_size == current.batch_size,), resource)
        if lower is not None:
            return lower
    return None


def _job(plan: Plan, current: StagePlan, weight_format: str, model: ModelSpec, support: Support) -> Job:
    """All that this stage could be in a weight format."""
    selection = Selection(
        dtype=current.compute_dtype,
        weight_format=weight_format if current.stage == "denoise" else "auto",
        text_weight_format=weight_format if current.component == "text_encoder" else "auto",
        step_cache=current.step_cache,
        batch_size=current.batch_size if current.stage == "denoise" else 0,
    )
    return Job(model, plan.workload, plan.hardware, selection, plan.limits, support, current.cached_batches)


def _lowered(
    plan: Plan, current: StagePlan, job: Job, kinds: Sequence[Callable[[StagePlan], bool]], resource: Resource
) -> Plan | None:
    """The plan with the fastest stage of the first kind that has one with a lower peak, by a share where it can."""
    peak = peak_bytes(current, resource)
    for most in (int((1 - RUNG_SHARE) * peak), peak - 1):
        for accept in kinds:
            lower = job.within(most, resource).best(current.stage, accept)
            if lower is not None:
                reason = f"ran out of memory at a predicted peak of {format_bytes(peak)}"
                lower = replace(lower, reasons=(reason,))
                stages = tuple(lower if stage.stage == lower.stage else stage for stage in plan.stages)
                return replace(plan, stages=stages)
    return None


def _chunk(stage: StagePlan) -> float:
    return stage.chunk_tokens or inf


def peak_bytes(stage: StagePlan, resource: Resource = "device") -> int:
    """Predicted peak of the memory that ran out: VRAM, or RAM for the host and on a CPU."""
    on_host = resource == "host" or stage.cost.on_host
    return stage.cost.peak_ram_bytes if on_host else stage.cost.peak_vram_bytes
