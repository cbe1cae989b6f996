"""The least time that a denoising step could take, however its blocks were placed; a plan's own time stands beside it.

In a format and batch, on a machine with V bytes of VRAM and M of RAM left for blocks of B bytes together:

    compute   all FLOPs of the step at their classes' rates, and the launches
    link      what VRAM cannot hold crosses the link at each step:            (B - V) / pinned h2d rate
    disk      what neither can hold is read again at each step:               (B - V - M) / disk rate

V is the budget without the context, the activations, their margin and the weights outside blocks, and with no slot at
all; M is the RAM budget without the libraries. Blocks are taken to be divisible. So no schedule is faster than the
largest of the three; the planner's time line is slower where slots take room, copies cannot start early enough, or host
memory cannot be pinned.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_flux2.planning.cost import device_bytes
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Limits, Plan
from lowmem_flux2.planning.stage_cost import Bottleneck
from lowmem_flux2.planning.stage_work import StageWork, stage_work


@dataclass(frozen=True, slots=True)
class Roofline:
    """Seconds of a step, all images of the run together."""

    compute_s: float
    link_s: float
    disk_s: float

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.link_s, self.disk_s)

    @property
    def bound_by(self) -> Bottleneck:
        kinds: tuple[tuple[Bottleneck, float], ...] = (
            ("compute", self.compute_s),
            ("link", self.link_s),
            ("disk", self.disk_s),
        )
        return max(kinds, key=lambda kind: kind[1])[0]


def roofline(plan: Plan, model: ModelSpec) -> Roofline:
    """Of the plan's denoise stage, in its format, batch and chunks."""
    hardware, limits = plan.hardware, plan.limits
    work = stage_work(plan.stage("denoise"), model, plan.workload, hardware)
    rounds = work.rounds / plan.workload.steps
    on_device, in_ram = _rooms(work, hardware, limits)
    beyond_device = max(sum(work.block_bytes) - on_device, 0)
    beyond_ram = max(beyond_device - in_ram, 0)
    return Roofline(
        compute_s=rounds * (sum(work.compute_ns) + work.between_ns) / 1e9,
        link_s=0.0 if hardware.device == "cpu" else rounds * beyond_device / hardware.h2d_pinned_bytes_per_s,
        disk_s=rounds * work.file_form.in_file(beyond_ram) / hardware.disk_read_bytes_per_s,
    )


def _rooms(work: StageWork, hardware: Hardware, limits: Limits) -> tuple[int, int]:
    """Bytes for blocks on the device, and in RAM beside a GPU."""
    taken = sum(device_bytes(work, 0, 0)) - max(work.once_bytes - work.activation_bytes, 0)
    if hardware.device == "cpu":
        return limits.ram_bytes - work.process_bytes - taken, 0
    return (
        limits.vram_bytes - hardware.context_bytes - taken,
        limits.ram_bytes - work.process_bytes,
    )
