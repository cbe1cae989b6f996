"""Part (a): streamed equals resident, bit for bit, in every weight format, at full block sizes."""

from __future__ import annotations

from functools import partial
from itertools import cycle, islice
from typing import Any

import torch

from gpu.case import Case
from gpu.running import Bench, Run, carry_out, with_placements
from lowmem_flux2.planning.plan import Placement, Plan, Stage
from lowmem_flux2.planning.selection import Selection, compute_dtype

BLOCKS = (2, 4)
STEPS = 2
VARIANTS: dict[str, tuple[tuple[Placement, ...], int]] = {
    "pinned": ((Placement.PINNED,), 2),
    "pinned, one slot": ((Placement.PINNED,), 1),
    "pageable": ((Placement.PAGEABLE,), 2),
    "disk": ((Placement.DISK,), 2),
    "mixed": ((Placement.GPU, Placement.DISK, Placement.PINNED, Placement.PAGEABLE), 3),
}
"""Placements, repeated over the blocks, and slots. ``disk`` goes through the ring, its bytes made rather than read."""


def cases(bench: Bench) -> list[Case]:
    """dev's blocks in each format; all of klein-4b, its text encoder streamed too, first at half the bytes (int8).

    Guesses of the two models differ, so that what one took says nothing of the other.
    """
    plain = compute_dtype(Selection(), bench.machine.hardware)
    formats = (plain, "int8", "w8a8", "nf4", "fp8", "int4", "int6")
    made = [Case(f"dev-{name}", partial(_compare, "dev", name, False), 40) for name in formats]
    whole = [Case(f"klein-4b-{name}", partial(_compare, "klein-4b", name, True), 41) for name in formats]
    return [*made[:2], whole.pop(1), *made[2:], *whole]


def _compare(name: str, weight_format: str, with_encoder: bool, bench: Bench) -> dict[str, Any]:
    model = bench.subject(name, BLOCKS)
    request = bench.request(model, STEPS)
    stages: tuple[Stage, ...] = ("encode", "denoise") if with_encoder else ("denoise",)
    formats = {"weight_format": weight_format}
    if with_encoder:
        formats["text_weight_format"] = weight_format
    plan = bench.plan(model, request, placement="resident", **formats)
    embeds = None if with_encoder else bench.embeds(model, plan)

    def run(placed: Plan) -> Run:
        return carry_out(bench, model, placed, request, embeds=embeds)

    reference, again = run(plan), run(plan)
    found: dict[str, dict[str, Any]] = {}
    for label, (pattern, slots) in VARIANTS.items():
        placed = plan
        for stage in stages:
            placements = islice(cycle(pattern), len(plan.stage(stage).block_placements))
            placed = with_placements(placed, model, stage, list(placements), slots)
        other = run(placed)
        found[label] = {
            "bit_equal": torch.equal(other.latents, reference.latents),
            "max_difference": float((other.latents.double() - reference.latents.double()).abs().max()),
            "step_median_s": other.step_s,
            "events": other.figures["events"],
        }
    equal = sum(variant["bit_equal"] for variant in found.values())
    repeats = torch.equal(reference.latents, again.latents)
    return {
        "met": repeats and equal == len(found),
        "repeats_itself": repeats,
        "variants": found,
        "latents": reference.figures["latents"],
        "deviation": float(reference.latents.double().std()),
        "line": f"{equal} of {len(found)} placements bit-equal to resident; "
        f"resident {'repeats' if repeats else 'DOES NOT repeat'} itself",
    }
