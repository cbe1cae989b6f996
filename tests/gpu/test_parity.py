"""On the card: streamed equals resident, bit for bit, and both equal the stock pipeline."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lowmem_flux2 import Engine
from lowmem_flux2.planning.plan import Placement

pytestmark = pytest.mark.gpu

FORMATS = ("bf16", "int8", "fp8", "nf4", "int4")
PLACEMENTS = {
    "pinned": ((Placement.PINNED,), 2),
    "pinned, one slot": ((Placement.PINNED,), 1),
    "pageable": ((Placement.PAGEABLE,), 2),
    "disk": ((Placement.DISK,), 2),
    "mixed": ((Placement.PINNED, Placement.GPU, Placement.DISK, Placement.PAGEABLE), 3),
}
"""Repeated over the blocks, and slots."""
ASKED: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
}


def latents(folder: Path, weight_format: str, placements: tuple[Placement, ...] | None, slots: int) -> torch.Tensor:
    with Engine(
        str(folder),
        device="cuda",
        dtype="bf16",
        weight_format=weight_format,
        text_weight_format=weight_format,
        placement="resident",
    ) as engine:
        plan = engine.plan(engine.request("a red circle", **ASKED))
        if placements is not None:
            stages = [
                replace(
                    stage,
                    block_placements=tuple(islice(cycle(placements), len(stage.block_placements))),
                    slots=slots,
                    prefetch_depth=slots - 1,
                )
                for stage in plan.stages
            ]
            plan = replace(plan, stages=tuple(stages))
        found: torch.Tensor = engine.generate("a red circle", **ASKED, seed=3, output_type="latent", plan=plan).images
    return found


@pytest.mark.parametrize("form", ["dev", "klein"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_streamed_equals_resident(form: str, weight_format: str, tiny_dev: Path, tiny_klein: Path) -> None:
    folder = tiny_dev if form == "dev" else tiny_klein
    expected = latents(folder, weight_format, None, 0)
    assert bool(torch.isfinite(expected).all())
    for name, (placements, slots) in PLACEMENTS.items():
        assert torch.equal(latents(folder, weight_format, placements, slots), expected), name


def test_latents_equal_the_stock_pipeline(tiny_klein: Path) -> None:
    stock = tiny.load_stock(tiny_klein, torch.bfloat16).to("cuda")  # CUDA's allocations are aligned
    made = stock(
        prompt="a red circle", **ASKED, generator=torch.Generator().manual_seed(3), output_type="latent"
    ).images
    assert torch.equal(latents(tiny_klein, "bf16", (Placement.PINNED,), 2).to("cpu"), made.to("cpu"))
