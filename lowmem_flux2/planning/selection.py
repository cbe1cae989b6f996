"""What the user fixed (Selection), the budgets that follow (Limits), and which of it a machine cannot honour."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import COMPUTE_DTYPES, FORMATS, PLAIN_FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Limits
from lowmem_flux2.planning.step_caches import step_cache_text
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import GIB

StreamFrom = Literal["auto", "resident", "pinned", "pageable", "disk"]

TILE_STEP_PX, TILE_MOST_PX = 64, 4096
RAM_RESERVE_BYTES = GIB
RAM_RESERVE_SHARE, MOST_RESERVE_SHARE = 10, 3
"""The system keeps at least RAM_RESERVE_BYTES, or one part in RAM_RESERVE_SHARE of RAM; never more than one part in
MOST_RESERVE_SHARE, since a small container's limit is on what runs in it, and not on the system."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user fixed; "auto" leaves it to the planner.

    Args:
        prefer: what is spent on what, see ``planner``.
        weight_format, text_weight_format: of the transformer and the text encoder. Unquantized weights rest in the
            compute dtype, so fixing fp32, fp16 or bf16 fixes the compute dtype too.
        dtype: compute dtype of all stages.
        placement: where the blocks rest that are not resident, or ``resident`` for all of them.
        vae_tile: ``auto``, ``off`` or a side in pixels.
        step_cache: ``auto``, ``off``, or a step cache as ``step_caches`` reads it.
        batch_size: most images denoised together; 0 is auto.
        max_vram_bytes, max_ram_bytes: caps on our process; None for no cap.
    """

    prefer: Preference = "balanced"
    weight_format: str = "auto"
    text_weight_format: str = "auto"
    dtype: str = "auto"
    placement: StreamFrom = "auto"
    vae_tile: str = "auto"
    step_cache: str = "auto"
    batch_size: int = 0
    max_vram_bytes: int | None = None
    max_ram_bytes: int | None = None


def limits_of(hardware: Hardware, selection: Selection) -> Limits:
    """The budgets: VRAM less what others hold, RAM less a share for the system, and the user's caps."""
    vram = hardware.vram_bytes - hardware.vram_reserve_bytes + hardware.context_bytes
    reserve = max(RAM_RESERVE_BYTES, hardware.ram_bytes // RAM_RESERVE_SHARE)
    ram = hardware.ram_bytes - min(reserve, hardware.ram_bytes // MOST_RESERVE_SHARE)
    if selection.max_vram_bytes is not None:
        vram = min(vram, selection.max_vram_bytes)
    if selection.max_ram_bytes is not None:
        ram = min(ram, selection.max_ram_bytes)
    # Nothing is pinned on a CPU: there "pinned" is RAM like any other.
    pinnable = hardware.pinnable_bytes if hardware.device == "cuda" else ram
    return Limits(vram_bytes=max(vram, 0), ram_bytes=max(ram, 0), pinnable_bytes=max(min(pinnable, ram), 0))


def with_ram_for(hardware: Hardware, max_ram_bytes: int) -> Hardware:
    """The same machine with just so much RAM that ``max_ram_bytes`` of it are ours; its pinnable share as before."""
    others = max(RAM_RESERVE_BYTES, -(-max_ram_bytes // (RAM_RESERVE_SHARE - 1)))
    others = min(others, max_ram_bytes // (MOST_RESERVE_SHARE - 1))
    ram = max_ram_bytes + others
    source = {"ram_bytes": "--max-ram and the system's share", "pinnable_bytes": "in proportion to --max-ram"}
    return replace(
        hardware,
        ram_bytes=ram,
        pinnable_bytes=hardware.pinnable_bytes * ram // hardware.ram_bytes,
        provenance={**hardware.provenance, **source},
    )


def runs_on(name: str, hardware: Hardware) -> bool:
    """Whether the hardware has the units that the weight format's compute dtype needs."""
    least = FORMATS[name].least_capability
    return least is None or hardware.compute_capability is None or hardware.compute_capability >= least


def compute_dtype(selection: Selection, hardware: Hardware) -> str:
    """The fixed one, else that of fixed unquantized weights; else bf16 where the hardware has it, fp16 on other GPUs
    (Turing), fp32 on other CPUs."""
    if selection.dtype != "auto":
        return selection.dtype
    for fixed in (selection.weight_format, selection.text_weight_format):
        if fixed in PLAIN_FORMATS:
            return fixed
    if hardware.device == "cpu":
        return "bf16" if "bf16" in hardware.matmul_flops_per_s else "fp32"
    return "bf16" if runs_on("bf16", hardware) else "fp16"


def check_selection(selection: Selection, hardware: Hardware) -> None:
    """Refuse names and combinations that can never be honoured, before any enumeration.

    Raises:
        UsageError: names the flag and what to write instead.
    """
    for flag, value, known in (
        ("--prefer", selection.prefer, get_args(Preference)),
        ("--weight-format", selection.weight_format, ("auto", *FORMATS)),
        ("--text-weight-format", selection.text_weight_format, ("auto", *FORMATS)),
        ("--dtype", selection.dtype, ("auto", *COMPUTE_DTYPES)),
        ("--placement", selection.placement, get_args(StreamFrom)),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value}: unknown; one of {', '.join(known)}")
        if value in FORMATS and not runs_on(value, hardware):
            capability = ".".join(map(str, hardware.compute_capability or ()))
            raise UsageError(
                f"{flag} {value}: {hardware.name} has no {value} units (compute capability {capability}); "
                "use fp16 or auto"
            )
    dtype = compute_dtype(selection, hardware)
    for flag, value in (
        ("--weight-format", selection.weight_format),
        ("--text-weight-format", selection.text_weight_format),
    ):
        if value in PLAIN_FORMATS and value != dtype:
            raise UsageError(
                f"{flag} {value} with compute dtype {dtype}: unquantized weights rest in the compute dtype; "
                f"use --dtype {value}, or {flag} {dtype}"
            )
    try:
        step_cache_text(selection.step_cache)
    except UsageError as error:
        raise UsageError(f"--step-cache {selection.step_cache}: {error}") from None
    if selection.vae_tile not in ("auto", "off") and not _is_tile(selection.vae_tile):
        raise UsageError(
            f"--vae-tile {selection.vae_tile}: auto, off, or a multiple of {TILE_STEP_PX} px up to {TILE_MOST_PX}"
        )
    if selection.batch_size < 0:
        raise UsageError(f"--batch-size {selection.batch_size}: at least 1, or 0 to leave it to the planner")


def _is_tile(text: str) -> bool:
    return (
        text.isascii()
        and text.isdigit()
        and TILE_STEP_PX <= int(text) <= TILE_MOST_PX
        and int(text) % TILE_STEP_PX == 0
    )
