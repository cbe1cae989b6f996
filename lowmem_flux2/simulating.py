"""``lowmem-flux2 simulate``, after planning: simulated beside predicted bytes of each stage. Imports torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lowmem_flux2.planning.cost import CUDA_HOST_BYTES, LIBRARIES_HOST_BYTES, READ_BUFFER_BYTES
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, StageCost
from lowmem_flux2.runtime.simulate import SimulatedStage, simulate_plan
from lowmem_flux2.units import format_bytes

KINDS = ("resident", "slots", "activations", "device", "host")


@dataclass(frozen=True, slots=True)
class Bytes:
    """Tensors of a stage at its peak, by kind; ``host`` is the RAM beside them, 0 where the device is the CPU."""

    resident: int
    slots: int
    activations: int
    host: int

    @property
    def device(self) -> int:
        return self.resident + self.slots + self.activations

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "device": self.device}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One stage, predicted in closed form and simulated on fake tensors. The predicted margin and context are in neither."""

    stage: str
    predicted: Bytes
    simulated: Bytes

    @property
    def device_error(self) -> float:
        """Of the device's peak, relative to the simulated one."""
        return (self.predicted.device - self.simulated.device) / self.simulated.device

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "predicted": self.predicted.to_json(),
            "simulated": self.simulated.to_json(),
            "device_error": self.device_error,
        }


def compare(plan: Plan, model: ModelSpec, configs: Path, *, every_block: bool = False) -> list[Comparison]:
    """Simulate a plan's stages; arguments as those of ``simulate_plan``."""
    stages = simulate_plan(plan, model, configs, every_block=every_block)
    return [
        Comparison(simulated.stage, predicted_bytes(planned.cost), simulated_bytes(simulated))
        for planned, simulated in zip(plan.stages, stages, strict=True)
    ]


def simulated_bytes(stage: SimulatedStage) -> Bytes:
    return Bytes(stage.resident_bytes, stage.slot_bytes, stage.activation_bytes, stage.host_bytes)


def predicted_bytes(cost: StageCost) -> Bytes:
    """Without what no tensor holds: margin, context, libraries, and the buffer that reads are converted in.

    On ``device=cpu`` a stage's inputs and results count as activations: there is one memory.
    """
    if cost.on_host:
        left = cost.peak_ram_bytes - LIBRARIES_HOST_BYTES - READ_BUFFER_BYTES - cost.margin_bytes
        return Bytes(cost.resident_bytes, cost.slot_bytes, left - cost.resident_bytes - cost.slot_bytes, 0)
    host = cost.peak_ram_bytes - LIBRARIES_HOST_BYTES - READ_BUFFER_BYTES - CUDA_HOST_BYTES
    return Bytes(cost.resident_bytes, cost.slot_bytes, cost.activation_bytes, host)


def table_of(comparisons: list[Comparison]) -> Table:
    """A row for each stage and kind."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("stage", "tensors", "predicted", "simulated", "difference"):
        table.add_column(heading, justify="left" if heading in ("stage", "tensors") else "right")
    for each in comparisons:
        for kind in KINDS:
            predicted, simulated = getattr(each.predicted, kind), getattr(each.simulated, kind)
            if not predicted and not simulated:
                continue
            off = f"{(predicted - simulated) / simulated:+.2%}" if simulated else "-"
            label = "device, together" if kind == "device" else kind
            table.add_row(
                each.stage if kind == "resident" else "", label, format_bytes(predicted), format_bytes(simulated), off
            )
    return table
