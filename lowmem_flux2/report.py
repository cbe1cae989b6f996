"""Predicted beside measured: the record of a run, as JSON and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.identity import Identity
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.references import Reference
from lowmem_flux2.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class StageMeasure:
    """What one stage took. ``peak_vram_bytes`` includes the CUDA context and is 0 on a CPU; see ``runtime.device``.

    ``step_s`` is the median time from one denoising step (encoder layer, picture) to the next, the first apart; 0 where
    there were fewer than two. ``disk_read_bytes`` came from the block device: 0 says that the page cache had it all,
    None that the system does not tell. ``skipped_steps`` are those that the step cache stood for, counted from 0, of
    each batch, and ``computed_blocks`` the blocks that all others came to, guidance passes together.
    """

    stage: str
    component: str
    load_s: float
    time_s: float
    peak_vram_bytes: int
    peak_allocated_bytes: int
    driver_used_bytes: int
    peak_ram_bytes: int
    peak_rss_bytes: int
    step_s: float = 0.0
    disk_read_bytes: int | None = None
    skipped_steps: tuple[tuple[int, ...], ...] = ()
    computed_blocks: int = 0


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One picture: its file (None in memory), its seed (None where a generator was given) and its prompt.

    ``upsampled_prompt`` is what the text encoder made of the prompt, its sampling seeded with ``upsample_seed``.
    """

    path: str | None
    seed: int | None
    prompt: str
    upsampled_prompt: str | None = None
    upsample_seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Without the last two where the prompt was taken as it is."""
        named = asdict(self)
        return {key: value for key, value in named.items() if value is not None or not key.startswith("upsample")}


@dataclass(frozen=True, slots=True)
class Report:
    """One run, with all that a calibration needs of it.

    Args:
        events: warnings and re-plans, in order.
        cached_prompts: came from the prompt cache.
        machine: where it ran; None where NVML does not know the GPU.
        spec: the model in numbers: reports outlive the folders that models were in.
        references: images that the pictures were made after.
    """

    plan: Plan
    stages: tuple[StageMeasure, ...]
    events: tuple[str, ...]
    images: tuple[ImageRecord, ...]
    versions: Mapping[str, str]
    cached_prompts: tuple[str, ...] = ()
    machine: Identity | None = None
    spec: ModelSpec | None = None
    references: tuple[Reference, ...] = ()

    @property
    def peak_vram_bytes(self) -> int:
        return max(stage.peak_vram_bytes for stage in self.stages)

    @property
    def peak_ram_bytes(self) -> int:
        return max(stage.peak_ram_bytes for stage in self.stages)

    @property
    def peak_rss_bytes(self) -> int:
        return max(stage.peak_rss_bytes for stage in self.stages)

    @property
    def time_s(self) -> float:
        return sum(stage.time_s for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The contract's report JSON."""
        return {
            "plan": self.plan.to_json(),
            "measured": {
                "peak_vram_bytes": self.peak_vram_bytes,
                "peak_ram_bytes": self.peak_ram_bytes,
                "peak_rss_bytes": self.peak_rss_bytes,
                "time_s": self.time_s,
                "stages": [asdict(stage) for stage in self.stages],
            },
            "events": list(self.events),
            "cached_prompts": list(self.cached_prompts),
            "images": [image.to_json() for image in self.images],
            "references": [asdict(reference) for reference in self.references],
            "versions": dict(self.versions),
            "machine": None if self.machine is None else asdict(self.machine),
            "model": None if self.spec is None else asdict(self.spec),
        }

    def table(self) -> Table:
        """A rich table: one row a stage, predicted -> measured."""
        on_gpu = self.plan.hardware.device == "cuda"
        table = Table(title="predicted → measured", title_justify="left")
        table.add_column("stage")
        table.add_column("format")
        if on_gpu:
            table.add_column("peak VRAM", justify="right")
        table.add_column("peak RAM", justify="right")
        table.add_column("time", justify="right")
        for stage in self.plan.stages:
            if self.plan.is_cached(stage):
                row = [f"{stage.stage} ({stage.component})", stage.weight_format, *["-"] * (1 + on_gpu)]
                table.add_row(*row, "from the prompt cache")
        for measured in self.stages:
            planned = next(stage for stage in self.plan.stages if stage.stage == measured.stage)
            row = [f"{measured.stage} ({measured.component})", planned.weight_format]
            if on_gpu:
                row.append(_pair(planned.cost.peak_vram_bytes, measured.peak_vram_bytes))
            row.append(_pair(planned.cost.peak_ram_bytes, measured.peak_ram_bytes))
            row.append(f"{format_seconds(planned.cost.time_s)} → {format_seconds(measured.time_s)}")
            table.add_row(*row)
        total = ["whole run", ""]
        if on_gpu:
            total.append(_pair(self.plan.peak_vram_bytes, self.peak_vram_bytes))
        total += [
            _pair(self.plan.peak_ram_bytes, self.peak_ram_bytes),
            f"{format_seconds(self.plan.time_s)} → {format_seconds(self.time_s)}",
        ]
        table.add_section()
        table.add_row(*total)
        return table


def _pair(predicted: int, measured: int) -> str:
    return f"{format_bytes(predicted)} → {format_bytes(measured)}"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all: temporary file beside it, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_STAGES: TypeAdapter[tuple[StageMeasure, ...]] = TypeAdapter(tuple[StageMeasure, ...])
_MACHINE: TypeAdapter[Identity | None] = TypeAdapter(Identity | None)
_SPEC: TypeAdapter[ModelSpec | None] = TypeAdapter(ModelSpec | None)


def read_report(path: Path) -> Report:
    """Read back what ``write_report`` wrote, but for the pictures.

    Raises:
        UsageError: not a report, or one of another version.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan.from_json(raw["plan"], str(path))
        stages = _STAGES.validate_python(raw["measured"]["stages"])
        machine, spec = _MACHINE.validate_python(raw.get("machine")), _SPEC.validate_python(raw.get("model"))
        return Report(plan, stages, tuple(raw["events"]), (), raw["versions"], machine=machine, spec=spec)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: not a report of this version: {where}: {first['msg']}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a report: {type(error).__name__}: {error}") from None


def write_report(report: Report, path: Path) -> None:
    write_atomically(path, json.dumps(report.to_json(), indent=2) + "\n")
