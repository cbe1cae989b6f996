"""``lowmem-flux2 simulate``, after planning: simulated beside predicted bytes of each stage. Imports torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from lowmem_flux2.planning.cost import READ_BUFFER_BYTES
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan, StagePlan
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.runtime.simulate import SimulatedStage, check_simulated, simulate_stage
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
    """One stage, predicted in closed form and simulated on fake tensors. Margin and context are in neither."""

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
    """Each stage of a plan.

    Args:
        configs: folder of the model's config files.
        every_block: run all blocks, layers and tiles, not only those that differ.

    Raises:
        UsageError: a stage that is not simulated.
    """
    for stage in plan.stages:
        check_simulated(stage)
    on_host = plan.hardware.device == "cpu"
    return [
        compare_stage(stage, plan.workload, model, configs, on_host=on_host, every_block=every_block)
        for stage in plan.stages
    ]


def compare_stage(
    stage: StagePlan,
    workload: Workload,
    model: ModelSpec,
    configs: Path,
    *,
    on_host: bool = False,
    every_block: bool = False,
) -> Comparison:
    """One priced stage; the other arguments as those of ``compare``."""
    simulated = simulate_stage(stage, workload, model, configs, on_host=on_host, every_block=every_block)
    return Comparison(stage.stage, predicted_bytes(stage.cost), simulated_bytes(simulated))


def simulated_bytes(stage: SimulatedStage) -> Bytes:
    return Bytes(stage.resident_bytes, stage.slot_bytes, stage.activation_bytes, stage.host_bytes)


def predicted_bytes(cost: StageCost) -> Bytes:
    """Without what no tensor holds: workspaces, margin, context, libraries, and what reads are converted in.

    On ``device=cpu`` a stage's inputs and results count as activations: there is one memory.
    """
    if cost.on_host:
        beside = cost.process_bytes + READ_BUFFER_BYTES + cost.workspace_bytes + cost.margin_bytes
        left = cost.peak_ram_bytes - beside
        return Bytes(cost.resident_bytes, cost.slot_bytes, left - cost.resident_bytes - cost.slot_bytes, 0)
    host = cost.peak_ram_bytes - cost.process_bytes - READ_BUFFER_BYTES
    return Bytes(cost.resident_bytes, cost.slot_bytes, cost.activation_bytes, host)


def table_of(comparisons: list[Comparison]) -> Table:
    """A row for each stage and kind."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("stage", "tensors", "predicted", "simulated", "difference"):
        table.add_column(heading, justify="left" if heading in ("stage", "tensors") else "right")
    for each in comparisons:
        stage = each.stage
        for kind in KINDS:
            predicted, simulated = getattr(each.predicted, kind), getattr(each.simulated, kind)
            if not predicted and not simulated:
                continue
            off = f"{(predicted - simulated) / simulated:+.2%}" if simulated else "-"
            label = "device, together" if kind == "device" else kind
            table.add_row(stage, label, format_bytes(predicted), format_bytes(simulated), off)
            stage = ""
    return table
