"""When nothing fits: the nearest changes that would, each planned for real and given as a command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Limits
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.selection import Selection, limits_of, with_ram_for
from lowmem_flux2.planning.sources import MODEL_NAMES, shipped_configs
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.planning.workload import Workload, guidance_passes
from lowmem_flux2.units import GIB, MIB, format_bytes, format_seconds

MOST = 3
DETECTED = "auto"
EMBEDDED = "shapes"
SIDES_PX = (1024, 768, 512, 256)
RAM_SIZES_GIB = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
VRAM_SIZES_GIB = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 80)


@dataclass(frozen=True, slots=True)
class _Change:
    """The job with something done differently."""

    model: ModelSpec
    workload: Workload
    hardware: Hardware
    selection: Selection

    def smaller(self, side: int) -> _Change:
        tokens = (side // self.model.size_multiple) ** 2
        return replace(self, workload=replace(self.workload, width=side, height=side, image_tokens=tokens))

    def with_ram(self, size_bytes: int) -> _Change:
        hardware = with_ram_for(self.hardware, size_bytes)
        return replace(self, hardware=hardware, selection=replace(self.selection, max_ram_bytes=size_bytes))

    def with_vram(self, size_bytes: int) -> _Change:
        return replace(self, selection=replace(self.selection, max_vram_bytes=size_bytes))

    def with_model(self, name: str) -> _Change:
        """Another model at its own defaults, the size kept."""
        model = spec_from_configs(name, name, shipped_configs(name))
        defaults = model.defaults
        workload = replace(
            self.workload,
            steps=defaults.num_inference_steps,
            text_tokens=defaults.max_sequence_length,
            guidance_passes=guidance_passes(model, defaults.guidance_scale),
        )
        return replace(self, model=model, workload=workload)

    def command(self, profile: str) -> str:
        """What plans just this on the command line; prompts apart, as only their number matters."""
        work, defaults, selection = self.workload, self.model.defaults, self.selection
        words = ["lowmem-flux2", "plan", "-m", self.model.source, "--profile", profile]
        if self.hardware.device == "cpu" and profile == DETECTED:
            words += ["--device", "cpu"]
        for flag, value, default in (
            ("-W", work.width, defaults.width),
            ("-H", work.height, defaults.height),
            ("--steps", work.steps, defaults.num_inference_steps),
            ("--num-images", work.num_images, 1),
            ("--max-sequence-length", work.text_tokens, defaults.max_sequence_length),
            ("--prefer", selection.prefer, "balanced"),
            ("--dtype", selection.dtype, "auto"),
        ):
            if value != default:
                words += [flag, str(value)]
        if work.guidance_passes != guidance_passes(self.model, defaults.guidance_scale):
            words += ["--guidance", "1" if work.guidance_passes == 1 else "4"]
        for flag, cap in (("--max-vram", selection.max_vram_bytes), ("--max-ram", selection.max_ram_bytes)):
            if cap is not None:
                words += [flag, f"{cap // GIB}GiB" if cap % GIB == 0 else f"{cap // MIB}MiB"]
        return shlex.join(words)


def closest_fits(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    profile: str,
    *,
    most: Limits | None = None,
    support: Support = SUPPORTED,
) -> tuple[str, ...]:
    """Up to three commands that would fit, the smallest change first, each another plan; never empty while any fits.

    What this version can carry out comes before what it cannot.

    Args:
        profile: what ``--profile`` was given; ``auto`` means that the hardware is this machine's and cannot grow.
        most: what is free here, where the job is to run here: no larger cap is offered.
    """
    found: list[str] = []
    later: list[str] = []
    seen = set()
    for change in _changes(_Change(model, workload, hardware, _whole_mib(selection)), profile, most):
        with suppress(DoesNotFit, UsageError):
            plan = make_plan(
                change.model, change.workload, change.hardware, change.selection, profile=profile, support=support
            )
            same = (plan.model, plan.workload, *map(format_bytes, (plan.peak_vram_bytes, plan.peak_ram_bytes)))
            if same in seen:  # a larger cap that wins nothing
                continue
            seen.add(same)
            notes = [f"{format_bytes(plan.peak_ram_bytes)} RAM", format_seconds(plan.time_s)]
            if plan.hardware.device == "cuda":
                notes.insert(0, f"{format_bytes(plan.peak_vram_bytes)} VRAM")
            if plan.not_executable:
                notes.append(f"not in this version: {', '.join(plan.not_executable)}")
            (later if plan.not_executable else found).append(f"{change.command(profile)}   # {', '.join(notes)}")
        if len(found) == MOST:
            break
    return tuple([*found, *later][:MOST])


def _changes(asked: _Change, profile: str, most: Limits | None) -> Iterator[_Change]:
    """One change at a time, the fixed choices freed; then each of them at the smallest size."""
    freed = replace(
        asked.selection,
        weight_format="auto",
        text_weight_format="auto",
        placement="auto",
        vae_tile="auto",
        batch_size=0,
    )
    free = replace(asked, selection=freed)
    if freed != asked.selection:
        yield free
    yield from _sizes(free)
    yield from _budgets(free, profile, most)
    models = [free.with_model(name) for name in MODEL_NAMES if name != EMBEDDED]
    others = [other for other in models if _smaller(other, free)]
    yield from others
    for one in (free, *others):
        least = one.smaller(SIDES_PX[-1])
        if one is not free:
            yield least
        yield from _budgets(least, profile, most)


def _smaller(other: _Change, one: _Change) -> bool:
    return other.model.transformer.total_weights < one.model.transformer.total_weights


def _sizes(one: _Change) -> Iterator[_Change]:
    for side in SIDES_PX:
        if side * side < one.workload.width * one.workload.height:
            yield one.smaller(side)


def _budgets(one: _Change, profile: str, most: Limits | None) -> Iterator[_Change]:
    """Higher caps: RAM beyond the card's typical machine, but nothing that the machine does not have."""
    limits = limits_of(one.hardware, one.selection)
    own_ram = limits_of(one.hardware, replace(one.selection, max_ram_bytes=None)).ram_bytes
    if most is not None:
        own_ram = min(own_ram, most.ram_bytes)
    for gib in RAM_SIZES_GIB:
        if limits.ram_bytes < gib * GIB and ((profile != DETECTED and most is None) or gib * GIB <= own_ram):
            yield one.with_ram(gib * GIB) if profile != DETECTED else _capped(one, gib * GIB)
    own_vram = limits_of(one.hardware, replace(one.selection, max_vram_bytes=None)).vram_bytes
    if most is not None:
        own_vram = min(own_vram, most.vram_bytes)
    for gib in VRAM_SIZES_GIB:
        if limits.vram_bytes < gib * GIB <= own_vram:
            yield one.with_vram(gib * GIB)


def _capped(one: _Change, size_bytes: int) -> _Change:
    return replace(one, selection=replace(one.selection, max_ram_bytes=size_bytes))


def _whole_mib(selection: Selection) -> Selection:
    """Caps as a command line gives them back."""

    def whole(cap: int | None) -> int | None:
        return None if cap is None else max(cap // MIB, 1) * MIB

    return replace(
        selection, max_vram_bytes=whole(selection.max_vram_bytes), max_ram_bytes=whole(selection.max_ram_bytes)
    )
