"""The recovery ladder: after a stage ran out of memory, the plan with the next lower peak.

Weights keep their format and a batch its composition, so that what has been computed stays right. First come fewer
resident blocks and fewer slots, which change no pixel; then smaller token chunks, which change none where matmul
kernels treat rows alike, and smaller VAE tiles, which change pixels slightly.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from lowmem_flux2.planning.candidates import Job
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, Stage, StagePlan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.support import SUPPORTED, Support

RUNG_SHARE = 0.1
"""A rung lowers the peak by a tenth where it can: less would climb for ever, each rung loads the weights again."""


def next_rung(plan: Plan, name: Stage, model: ModelSpec, support: Support = SUPPORTED) -> Plan | None:
    """The same plan with this stage on the next lower rung; None on the last one."""
    current = plan.stage(name)
    selection = Selection(
        dtype=current.compute_dtype,
        weight_format=current.weight_format if name == "denoise" else "auto",
        text_weight_format=current.weight_format if name == "encode" else "auto",
        batch_size=current.batch_size if name == "denoise" else 0,
    )
    job = Job(model, plan.workload, plan.hardware, selection, plan.limits, support)

    def alike(stage: StagePlan) -> bool:
        return (stage.weight_format, stage.batch_size) == (current.weight_format, current.batch_size)

    def same_chunks(stage: StagePlan) -> bool:
        return alike(stage) and stage.chunk_tokens == current.chunk_tokens

    def smaller_chunks(stage: StagePlan) -> bool:
        return alike(stage) and _chunk(stage) < _chunk(current)

    peak = peak_bytes(current)
    for most in (int((1 - RUNG_SHARE) * peak), peak - 1):
        for accept in (same_chunks, smaller_chunks):
            lower = job.within(most).best(name, accept)
            if lower is not None:
                lower = replace(lower, reasons=(f"ran out of memory at a predicted peak of {peak} bytes",))
                return replace(plan, stages=tuple(lower if stage.stage == name else stage for stage in plan.stages))
    return None


def _chunk(stage: StagePlan) -> float:
    return stage.chunk_tokens or inf


def peak_bytes(stage: StagePlan) -> int:
    """Predicted peak of the memory that the compute device uses: VRAM, or RAM on a CPU."""
    return stage.cost.peak_ram_bytes if stage.cost.on_host else stage.cost.peak_vram_bytes
