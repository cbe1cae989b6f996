"""Part (b): whole runs at 1024 x 1024 under VRAM caps: fits or not, predicted beside measured.

A capped run proves memory, never bandwidth: the card behind the cap keeps its own speed and link. Weights are made in
RAM, so load times are not those of a checkpoint on a disk, and blocks placed on disk are only as slow as RAM.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu.case import Case
from gpu.running import Bench, carry_out
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.units import GIB, MIB

STEPS = {"dev": 3, "klein-9b": 4, "klein-4b": 4}
GUESS_S = {"dev": 75.0, "klein-9b": 30.0, "klein-4b": 20.0}
ORDER = (
    *(("klein-9b", 8), ("dev", 16), ("klein-4b", 6), ("dev", 24), ("dev", 12), ("klein-9b", 12), ("dev", 8)),
    *(("klein-4b", 4), ("klein-9b", 6), ("dev", 6), ("klein-9b", 4), ("dev", 4), ("klein-4b", 8), ("klein-9b", 16)),
    *(("klein-4b", 12), ("klein-9b", 24), ("klein-4b", 16), ("klein-4b", 24)),
)
"""Model and cap in GiB, in the format that the planner takes for this card."""
FIXED = (("dev", 12, "nf4"), ("klein-9b", 8, ""), ("dev", 16, ""))
"""Formats ("" is unquantized) that the planner would not take there: what a faster link or a slower card would get."""
TINY_CAPS_BYTES = (2 * GIB, 64 * MIB)


def cases(bench: Bench) -> list[Case]:
    """On a CPU the cap is one of RAM."""
    plain = compute_dtype(Selection(), bench.machine.hardware)
    if bench.tiny:
        asked = [(name, cap, "auto") for cap in TINY_CAPS_BYTES for name in STEPS]
    else:
        asked = [(name, gib * GIB, "auto") for name, gib in ORDER]
        asked[7:7] = [(name, gib * GIB, form or plain) for name, gib, form in FIXED]
    return [
        Case(
            f"{name}-{cap / GIB:g}gib" + ("" if form == "auto" else f"-{form}"),
            partial(capped, name, cap, form),
            5 if bench.tiny else GUESS_S[name],
        )
        for name, cap, form in asked
    ]


def capped(name: str, cap_bytes: int, weight_format: str, bench: Bench) -> dict[str, Any]:
    """A whole run of one picture under a cap.

    Raises:
        DoesNotFit: which is a result.
    """
    model = bench.subject(name)
    on_card = bench.machine.hardware.device == "cuda"
    cap = {"max_vram_bytes" if on_card else "max_ram_bytes": cap_bytes}
    # The plan of a whole generation, of which a few steps are run: a plan for a few would shun what loads slowly.
    whole = bench.request(model, model.source.spec.defaults.num_inference_steps)
    plan = bench.plan(model, whole, weight_format=weight_format, **cap)
    run = carry_out(bench, model, plan, bench.request(model, STEPS[name]), result="pictures")
    peak = run.figures["peak_vram_bytes"] if on_card else max(m.peak_ram_bytes for m in run.outcome.measures)
    predicted = _predicted(run.plan, on_card)
    denoise = next(stage for stage in run.figures["stages"] if stage["stage"] == "denoise")
    moved = denoise["transfers"]
    rate = f"{moved['bytes_per_s'] / 1e9:.1f} GB/s" if moved["bytes_per_s"] else "nothing copied"
    rungs = sum("out of memory" in event for event in run.figures["events"])
    waited = moved["compute_waited_s"] + moved["host_waited_s"]
    return run.figures | {
        "cap_bytes": cap_bytes,
        "plan": plan.digest,
        "met": peak <= cap_bytes and not rungs,
        "rungs": rungs,
        "line": f"{denoise['weight_format']} {denoise['placements']}, peak {_gib(predicted)} -> {_gib(peak)} "
        f"of {_gib(cap_bytes)} GiB, step {run.figures['predicted_step_s']:.3f} -> {run.step_s:.3f} s, "
        f"{rate}, waited {waited:.3f} s" + (f", {rungs} TIMES OUT OF MEMORY" if rungs else ""),
    }


def _predicted(plan: Plan, on_card: bool) -> int:
    return plan.peak_vram_bytes if on_card else plan.peak_ram_bytes


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f}"
