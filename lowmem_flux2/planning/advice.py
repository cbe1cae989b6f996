"""When nothing fits: the nearest changes that would, each planned for real and given as a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.planner import Selection, make_plan
from lowmem_flux2.planning.sources import MODEL_NAMES, shipped_configs
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import GIB, format_bytes, format_seconds

MOST = 3
SIDES_PX = (1024, 768, 512, 256)
RAM_SIZES_GIB = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
VRAM_SIZES_GIB = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 80)


@dataclass(frozen=True, slots=True)
class _Change:
    """One thing (or two) done differently, and the flags that do it."""

    flags: str
    model: ModelSpec
    workload: Workload
    hardware: Hardware
    selection: Selection


def closest_fits(
    model: ModelSpec, workload: Workload, hardware: Hardware, selection: Selection, profile: str
) -> tuple[str, ...]:
    """Up to three commands that would fit, the smallest change first; never empty while anything at all fits."""
    found: list[str] = []
    for change in _changes(model, workload, hardware, selection, profile):
        with suppress(DoesNotFit, UsageError):
            plan = make_plan(
                change.model, change.workload, change.hardware, change.selection, profile=profile, support=EVERYTHING
            )
            peaks = f"{format_bytes(plan.peak_ram_bytes)} RAM, {format_seconds(plan.time_s)}"
            if plan.peak_vram_bytes:
                peaks = f"{format_bytes(plan.peak_vram_bytes)} VRAM, {peaks}"
            found.append(f"lowmem-flux2 plan {change.flags}   # {peaks}")
        if len(found) == MOST:
            break
    return tuple(found)


def _changes(
    model: ModelSpec, workload: Workload, hardware: Hardware, selection: Selection, profile: str
) -> Iterator[_Change]:
    base = f"-m {model.name} --profile {profile}"
    free = replace(
        selection, weight_format="auto", text_weight_format="auto", placement="auto", vae_tile="auto", batch_size=0
    )
    caps = _cap_flags(selection)
    if free != selection:
        yield _Change(f"{base}{caps}", model, workload, hardware, free)
    for side in SIDES_PX:
        if side < max(workload.width, workload.height):
            smaller = _resized(workload, model, side)
            yield _Change(f"{base}{caps} -W {side} -H {side}", model, smaller, hardware, free)
    for size in RAM_SIZES_GIB:
        if size * GIB > min(hardware.ram_bytes, selection.max_ram_bytes or hardware.ram_bytes):
            more = replace(hardware, ram_bytes=max(hardware.ram_bytes, size * GIB))
            roomy = replace(free, max_ram_bytes=size * GIB)
            yield _Change(f"{base}{_cap_flags(roomy)}", model, workload, more, roomy)
    for size in VRAM_SIZES_GIB:
        if hardware.vram_bytes and size * GIB > min(hardware.vram_bytes, selection.max_vram_bytes or 0):
            if size * GIB > hardware.vram_bytes:
                break  # a larger card is not a command
            roomy = replace(free, max_vram_bytes=size * GIB)
            yield _Change(f"{base}{_cap_flags(roomy)}", model, workload, hardware, roomy)
    for name in MODEL_NAMES:
        if name == "shapes" or name == model.name:
            continue
        other = spec_from_configs(name, name, shipped_configs(name))
        if other.transformer.total_weights < model.transformer.total_weights:
            yield _Change(f"-m {name} --profile {profile}{caps}", other, workload, hardware, free)


def _cap_flags(selection: Selection) -> str:
    flags = ""
    if selection.max_vram_bytes is not None:
        flags += f" --max-vram {selection.max_vram_bytes // (1 << 20)}MiB"
    if selection.max_ram_bytes is not None:
        flags += f" --max-ram {selection.max_ram_bytes // (1 << 20)}MiB"
    return flags


def _resized(workload: Workload, model: ModelSpec, side: int) -> Workload:
    tokens = (side // model.size_multiple) ** 2
    return replace(workload, width=side, height=side, image_tokens=tokens)
