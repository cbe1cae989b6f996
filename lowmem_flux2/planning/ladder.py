"""The recovery ladder: after a stage ran out of memory, the plan with the next lower peak.

Weights keep their format and a batch its composition, so that what has been computed stays right: fewer resident blocks
and fewer slots change no pixel, smaller VAE tiles change them slightly.
"""

from __future__ import annotations

from dataclasses import replace

from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, Stage, StagePlan
from lowmem_flux2.planning.planner import Objective
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
    lower = [
        stage
        for stage in job.candidates(name)
        if fits(stage, plan.limits)
        and peak_bytes(stage) < peak_bytes(current)
        and (stage.weight_format, stage.batch_size) == (current.weight_format, current.batch_size)
    ]
    if not lower:
        return None
    target = (1 - RUNG_SHARE) * peak_bytes(current)
    key = Objective("speed", plan.hardware).key
    chosen = min([stage for stage in lower if peak_bytes(stage) <= target] or lower, key=key)
    reason = f"ran out of memory at a predicted peak of {peak_bytes(current)} bytes"
    chosen = replace(chosen, reasons=(reason,))
    return replace(plan, stages=tuple(chosen if stage.stage == name else stage for stage in plan.stages))


def peak_bytes(stage: StagePlan) -> int:
    """Predicted peak of the memory that the compute device uses: VRAM, or RAM on a CPU."""
    return stage.cost.peak_ram_bytes if stage.cost.on_host else stage.cost.peak_vram_bytes
