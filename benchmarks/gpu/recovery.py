"""Part (e): memory runs out for real under a tight cap, in each stage, and the run goes on to the same latents.

The shortage is another holder of memory: when a stage is under way, a tensor takes what the plan counted on. The cap
holds for both, so the allocator refuses, the ladder lowers the stage and goes on from the last finished step. On a CPU,
where nothing refuses, the error itself is raised at the same place.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu.case import Case
from gpu.running import Bench, Watch, carry_out, with_stage
from lowmem_flux2.planning.plan import Plan, Stage

MODEL = "klein-4b"
STEPS = 4
DENOISE_STEP = 2
"""The shortage begins after so many steps."""
LEFT = {"encode": 0.6, "denoise": 0.6, "decode": 0.7}
"""Share of the stage's predicted peak that is left to it."""


class Hog(Watch):
    """Takes device memory once, ``after`` advances of a stage, and gives it back when the stage ends.

    Args:
        allowed_bytes: what the allocator may hold under the cap.
        left_bytes: what is left to the stage.
    """

    def __init__(self, stage: Stage, after: int, device: torch.device, allowed_bytes: int, left_bytes: int) -> None:
        super().__init__()
        self._target, self._after, self._device = stage, after, device
        self._bytes = max(allowed_bytes - left_bytes, 0)
        self._held: torch.Tensor | None = None
        self._has_struck = False
        self.held_bytes = 0

    def stage_started(self, stage: str, total: int) -> None:
        super().stage_started(stage, total)
        if stage == self._target and self._after == 0 and self._device.type == "cuda":
            self._strike()

    def advanced(self) -> None:
        super().advanced()
        if self._stage == self._target and len(self.advances[self._stage]) == max(self._after, 1):
            self._strike()

    def stage_finished(self, stage: str) -> None:
        if stage == self._target:
            self._held = None

    def _strike(self) -> None:
        """Take memory; what the run itself holds cannot be taken, and what it keeps for later is given back first."""
        if self._has_struck:
            return
        self._has_struck = True
        if self._device.type != "cuda":
            raise torch.OutOfMemoryError("out of memory, raised on purpose. On a CPU no allocator refuses")
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        size = self._bytes
        while self._held is None and size > 0:
            try:
                self._held = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                size -= 32 << 20
        self.held_bytes = size


def cases(bench: Bench) -> list[Case]:
    stages: tuple[tuple[Stage, int], ...] = (("denoise", DENOISE_STEP), ("encode", 0), ("decode", 0))
    return [Case(f"{MODEL}-{stage}", partial(_strike, stage, after), 45) for stage, after in stages]


def _strike(stage: Stage, after: int, bench: Bench) -> dict[str, Any]:
    model = bench.subject(MODEL)
    request = bench.request(model, STEPS)
    free = bench.plan(model, request, placement="resident")
    on_card = bench.machine.hardware.device == "cuda"
    plan = free
    if on_card:  # under a cap that just holds this stage resident, so that anything taken is missed
        capped = bench.plan(model, request, max_vram_bytes=free.stage(stage).cost.peak_vram_bytes)
        plan = with_stage(capped, free.stage(stage))
    expected = carry_out(bench, model, plan, request, result="pictures")
    context = plan.hardware.context_bytes
    hog = Hog(
        stage,
        after,
        torch.device(bench.device),
        plan.limits.vram_bytes - context,
        int(LEFT[stage] * plan.stage(stage).cost.peak_vram_bytes) - context,
    )
    broken = carry_out(bench, model, plan, request, result="pictures", watch=hog)
    happened = [event for event in broken.figures["events"] if "out of memory" in event]
    equal = torch.equal(broken.latents, expected.latents)
    picture, unbroken = broken.outcome.pictures, expected.outcome.pictures
    assert picture is not None and unbroken is not None
    same_picture = torch.equal(picture, unbroken)
    kept = _format(plan, stage) == _format(broken.plan, stage)
    return {
        "met": bool(happened) and equal,
        "ran_out": len(happened),
        "bit_equal_latents": equal,
        "bit_equal_picture": same_picture,
        "largest_picture_difference": float((picture.double() - unbroken.double()).abs().max()),
        "same_format": kept,
        "held_by_other_bytes": hog.held_bytes,
        "unbroken": expected.figures,
        "broken": broken.figures,
        "line": f"{len(happened)} times out of memory in {stage}; latents {'bit-equal' if equal else 'NOT EQUAL'}, "
        f"picture {'bit-equal' if same_picture else 'differs (other tiles)'}: "
        + (happened[-1].rpartition("; ")[2] if happened else "NOTHING HAPPENED"),
    }


def _format(plan: Plan, stage: Stage) -> str:
    return plan.stage(stage).weight_format
