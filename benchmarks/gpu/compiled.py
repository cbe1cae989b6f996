"""Part (g): blocks compiled one by one (torch.compile, regional) under streaming."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from gpu.case import Case
from gpu.running import Bench, Run, carry_out, with_placements
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.runtime.components import Blocks

STEPS = 6
SLOTS = 2


def cases(bench: Bench) -> list[Case]:
    """Unquantized, and int8, whose expansion a compiler can fuse."""
    plain = compute_dtype(Selection(), bench.machine.hardware)
    pairs = [("klein-9b", plain), ("klein-9b", "int8"), ("klein-4b", plain), ("dev", "int8")]
    if bench.tiny:
        pairs = pairs[1:2]
    return [
        Case(f"{name}-{form}", partial(_compare, name, form), 120, timeout_s=300, alone=True) for name, form in pairs
    ]


def _compare(name: str, weight_format: str, bench: Bench) -> dict[str, Any]:
    model = bench.subject(name)
    request = bench.request(model, STEPS)
    resident = bench.plan(model, request, weight_format=weight_format, placement="resident")
    blocks = len(resident.stage("denoise").block_placements)
    streamed = with_placements(resident, model, "denoise", [Placement.PINNED] * blocks, SLOTS)
    embeds = bench.embeds(model, resident)
    backend = "eager" if bench.tiny else "inductor"

    def compile_blocks(stage: StagePlan, parts: Blocks) -> None:
        for module in parts.modules:
            module.compile(fullgraph=True, dynamic=False, backend=backend)

    torch._dynamo.reset()
    counters.clear()
    runs: dict[str, Run] = {}
    for label, plan in (("resident", resident), ("streamed", streamed)):
        runs[f"eager, {label}"] = carry_out(bench, model, plan, request, embeds=embeds)
        runs[f"compiled, {label}"] = carry_out(bench, model, plan, request, embeds=embeds, on_blocks=compile_blocks)
    step = {label: run.step_s for label, run in runs.items()}
    equal = torch.equal(runs["compiled, streamed"].latents, runs["compiled, resident"].latents)
    eager, compiled = (runs[f"{kind}, resident"].latents.double() for kind in ("eager", "compiled"))
    graphs = counters["stats"]["unique_graphs"]
    ratio = step["compiled, streamed"] / step["compiled, resident"]
    return {
        "met": equal,
        "bit_equal_streamed": equal,
        "relative_difference_to_eager": float((compiled - eager).norm() / eager.norm()),
        "ratio_streamed_to_resident": ratio,
        "speedup_resident": step["eager, resident"] / step["compiled, resident"],
        "speedup_streamed": step["eager, streamed"] / step["compiled, streamed"],
        "first_step_s": {label: run.figures["step_s"][0] for label, run in runs.items()},
        "step_median_s": step,
        "backend": backend,
        "graphs": graphs,
        "runs": {label: run.figures for label, run in runs.items()},
        "line": "step "
        + ", ".join(f"{label} {seconds:.3f} s" for label, seconds in step.items())
        + f"; compiled streamed / resident {ratio:.2f}, {'bit-equal' if equal else 'NOT EQUAL'}, {graphs} graphs",
    }
