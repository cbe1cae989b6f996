"""What a stage really took of RAM, against the cap and the prediction."""

from __future__ import annotations

from lowmem_flux2.planning.cost import margin_bytes
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Limits, StagePlan
from lowmem_flux2.units import format_bytes


def overrun(stage: StagePlan, hardware: Hardware, limits: Limits, measured_bytes: int, before_bytes: int) -> str | None:
    """Say by how much a stage exceeded the RAM budget, or what was predicted by more than the margin; else None.

    Args:
        measured_bytes: peak RAM of the process in the stage.
        before_bytes: what the process held when the run began. A program that uses the engine may hold more than the
            libraries, which no plan can know: the prediction is for what is added to that.
    """
    others = max(before_bytes - hardware.libraries_host_bytes, 0)
    predicted = stage.cost.peak_ram_bytes
    held = f", {format_bytes(others)} of which were held before the run" if others else ""
    took = f"{stage.stage}: peak RAM was {format_bytes(measured_bytes)}{held}"
    if measured_bytes > limits.ram_bytes:
        over = format_bytes(measured_bytes - limits.ram_bytes)
        return (
            f"{took}: {over} over the budget of {format_bytes(limits.ram_bytes)} (predicted {format_bytes(predicted)})"
        )
    margin = stage.cost.margin_bytes or margin_bytes(hardware.allocator_overhead_bytes, 0, 0)
    if measured_bytes > predicted + others + margin:
        return f"{took}: predicted were {format_bytes(predicted)} and a margin of {format_bytes(margin)}"
    return None
