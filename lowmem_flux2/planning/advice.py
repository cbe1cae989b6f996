"""When nothing fits: the nearest changes that would, each planned for real and given as a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.changes import DETECTED, Change
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Limits
from lowmem_flux2.planning.selection import Selection, limits_of
from lowmem_flux2.planning.sources import MODEL_NAMES
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import GIB, MIB, format_bytes, format_seconds

MOST = 3
EMBEDDED = "shapes"
SIDES_PX = (1024, 768, 512, 256)
RAM_SIZES_GIB = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
VRAM_SIZES_GIB = (2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
FIXABLE = ("weight_format", "text_weight_format", "placement", "vae_tile", "batch_size", "dtype")
"""Choices that a user may have fixed, in the order in which they are given up."""


def closest_fits(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    profile: str,
    *,
    most: Limits | None = None,
    support: Support = SUPPORTED,
    words: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Up to three commands that would fit, the smallest change first, each a change of another kind (a smaller picture,
    more VRAM, a smaller model); never empty while any fits.

    What this version can carry out comes before what it cannot.

    Args:
        profile: what ``--profile`` was given; ``auto`` means that the hardware is this machine's and cannot grow.
        most: what is free here, where the job is to run here: no larger cap is offered.
        words: name the model on a command line (see ``Change``).
    """
    found: list[str] = []
    later: list[str] = []
    seen, kinds = set(), set[tuple[int, frozenset[str]]]()
    asked = Change(model, workload, hardware, _whole_mib(selection), words)
    for change in _changes(asked, profile, most):
        kind = change.kind(asked)
        if any(weights == kind[0] and fields <= kind[1] for weights, fields in kinds):  # less of it is enough
            continue
        with suppress(DoesNotFit, UsageError):
            plan = change.plan(profile, support)
            same = (plan.model, plan.workload, *map(format_bytes, (plan.peak_vram_bytes, plan.peak_ram_bytes)))
            if same in seen:  # a larger cap that wins nothing
                continue
            seen.add(same)
            notes = [f"{format_bytes(plan.peak_ram_bytes)} RAM", format_seconds(plan.time_s)]
            if plan.hardware.device == "cuda":
                notes.insert(0, f"{format_bytes(plan.peak_vram_bytes)} VRAM")
            if plan.not_executable:
                notes.append(f"not in this version: {', '.join(plan.not_executable)}")
            else:
                kinds.add(kind)
            (later if plan.not_executable else found).append(f"{change.command(profile)}   # {', '.join(notes)}")
        if len(found) == MOST:
            break
    return tuple([*found, *later][:MOST])


def _changes(asked: Change, profile: str, most: Limits | None) -> Iterator[Change]:
    """One change at a time, the fixed choices given up; then everything at its smallest."""
    free = asked
    for name in FIXABLE:
        default = getattr(Selection(), name)
        if getattr(asked.selection, name) != default:
            yield asked.with_choice(name, default)
            free = free.with_choice(name, default)
    yield free
    yield from _sizes(free)
    yield from _small_references(free)
    yield from _budgets(free, profile, most)
    yield free.with_one_image()
    yield free.with_short_text()
    models = [free.with_model(name) for name in MODEL_NAMES if name != EMBEDDED]
    others = sorted((other for other in models if _smaller(other, free)), key=_size)
    yield from others
    for one in (free, *others):
        least = one.with_one_image().with_short_text()
        least = next(iter([*_small_references(least)][-1:]), least)
        if one.workload.width * one.workload.height > SIDES_PX[-1] ** 2:
            least = least.smaller(SIDES_PX[-1])
        yield least
        yield from _budgets(least, profile, most)


def _smaller(other: Change, one: Change) -> bool:
    """Fewer weights, or as many in fewer guidance passes."""
    (weights, passes), (its_weights, its_passes) = _size(other), _size(one)
    return (-weights, passes) < (-its_weights, its_passes)


def _size(one: Change) -> tuple[int, int]:
    """In this order the largest model is first, and of two alike the one with fewer guidance passes."""
    return -one.model.transformer.total_weights, one.workload.guidance_passes


def _sizes(one: Change) -> Iterator[Change]:
    for side in SIDES_PX:
        if side * side < one.workload.width * one.workload.height:
            yield one.smaller(side)


def _small_references(one: Change) -> Iterator[Change]:
    for side in SIDES_PX:
        if any(side * side < width * height for width, height in one.workload.references):
            yield one.with_small_references(side)


def _budgets(one: Change, profile: str, most: Limits | None) -> Iterator[Change]:
    """Higher caps: RAM beyond the card's typical machine, but nothing that the machine does not have."""
    limits = limits_of(one.hardware, one.selection)
    own = limits_of(one.hardware, replace(one.selection, max_ram_bytes=None, max_vram_bytes=None))
    if most is not None:
        own = Limits(min(own.vram_bytes, most.vram_bytes), min(own.ram_bytes, most.ram_bytes), own.pinnable_bytes)
    may_grow = profile != DETECTED and most is None
    ram_sizes = sorted({*(gib * GIB for gib in RAM_SIZES_GIB), own.ram_bytes // MIB * MIB})
    ram_sizes = [size for size in ram_sizes if limits.ram_bytes < size and (may_grow or size <= own.ram_bytes)]
    vram_sizes = sorted({*(gib * GIB for gib in VRAM_SIZES_GIB), own.vram_bytes // MIB * MIB})
    vram_sizes = [size for size in vram_sizes if limits.vram_bytes < size <= own.vram_bytes]

    def with_ram(change: Change, size: int) -> Change:
        return change.with_ram(size) if profile != DETECTED else change.with_choice("max_ram_bytes", size)

    yield from (with_ram(one, size) for size in ram_sizes)
    yield from (one.with_choice("max_vram_bytes", size) for size in vram_sizes)
    for step in range(max(len(ram_sizes), len(vram_sizes)) if ram_sizes and vram_sizes else 0):
        more = with_ram(one, ram_sizes[min(step, len(ram_sizes) - 1)])
        yield more.with_choice("max_vram_bytes", vram_sizes[min(step, len(vram_sizes) - 1)])


def _whole_mib(selection: Selection) -> Selection:
    """Caps as a command line gives them back."""

    def whole(cap: int | None) -> int | None:
        return None if cap is None else max(cap // MIB, 1) * MIB

    return replace(
        selection, max_vram_bytes=whole(selection.max_vram_bytes), max_ram_bytes=whole(selection.max_ram_bytes)
    )
