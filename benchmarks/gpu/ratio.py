"""Part (c): what streaming costs: step time with every block streamed from pinned RAM, over fully resident."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu.case import Case
from gpu.running import Bench, Run, carry_out, case_on_record, with_placements
from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.planning.selection import Selection, compute_dtype

STEPS = 6
SLOTS = 2
GUESS_S = {"dev": 90.0, "klein-9b": 35.0, "klein-4b": 20.0}


def cases(bench: Bench) -> list[Case]:
    """Each model in each format, the middle one first."""
    plain = compute_dtype(Selection(), bench.machine.hardware)
    pairs = [
        (name, weight_format)
        for name in GUESS_S
        for weight_format in (plain, "int8", "w8a8", "int6", "fp8", "nf4", "int4")
    ]
    first = [
        ("klein-9b", plain),
        ("klein-9b", "w8a8"),
        ("klein-9b", "int8"),
        ("dev", "int8"),
        ("klein-4b", plain),
        ("dev", "nf4"),
    ]
    ordered = [*first, *(pair for pair in reversed(pairs) if pair not in first)]
    return [
        Case(f"{name}-{weight_format}", partial(_compare, name, weight_format), 5 if bench.tiny else GUESS_S[name])
        for name, weight_format in ordered
    ]


def _compare(name: str, weight_format: str, bench: Bench) -> dict[str, Any]:
    model = bench.subject(name)
    request = bench.request(model, STEPS)
    plan = bench.plan(model, request, weight_format=weight_format, placement="resident")
    blocks = len(plan.stage("denoise").block_placements)
    streamed_plan = with_placements(plan, model, "denoise", [Placement.PINNED] * blocks, SLOTS)
    needed, there = streamed_plan.stage("denoise").cost.host_pinned_bytes, plan.limits.pinnable_bytes
    if needed > there:
        raise DoesNotFit("denoise", "pinnable ram", needed, there)
    embeds = bench.embeds(model, plan)
    streamed = carry_out(bench, model, streamed_plan, request, embeds=embeds)
    resident = carry_out(bench, model, plan, request, embeds=embeds)
    ratio = streamed.step_s / resident.step_s
    predicted = streamed.figures["predicted_step_s"] / resident.figures["predicted_step_s"]
    equal = torch.equal(streamed.latents, resident.latents)
    over_plain = _over_plain(bench, name, weight_format, streamed, resident)
    return {
        "met": equal,
        "bit_equal": equal,
        "ratio": ratio,
        "predicted_ratio": predicted,
        "over_unquantized": over_plain,
        "streamed": streamed.figures,
        "resident": resident.figures,
        "line": f"step {streamed.step_s:.3f} s streamed, {resident.step_s:.3f} s resident: ratio {ratio:.2f} "
        f"(predicted {predicted:.2f}), {'bit-equal' if equal else 'NOT EQUAL'}"
        + "".join(f"; {kind} {over:.2f} of {over_plain['format']}'s" for kind, over in over_plain["step"].items()),
    }


def _over_plain(bench: Bench, name: str, weight_format: str, streamed: Run, resident: Run) -> dict[str, Any]:
    """Step times over those of the same model unquantized, whose case comes first; none where that is not on record.

    So w8a8's says what int8 matmuls gain.
    """
    plain = compute_dtype(Selection(), bench.machine.hardware)
    there = case_on_record(bench, "ratio", f"{name}-{plain}")
    if there is None or weight_format == plain:
        return {"format": plain, "step": {}}
    runs = {"streamed": streamed, "resident": resident}
    return {"format": plain, "step": {kind: run.step_s / there[kind]["step_median_s"] for kind, run in runs.items()}}
