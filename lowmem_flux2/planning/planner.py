"""Choose a plan: enumerate formats x placements x batch x chunks x tiles for each stage, price them, take the best that fits.

Stages never hold weights at the same time (staged residency), so each is chosen by itself; only time couples them:
``balanced`` spends at most a share of the whole run's time on better weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.formats import COMPUTE_DTYPES, FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import BlockSpec, ModelSpec
from lowmem_flux2.planning.plan import SCHEMA_VERSION, Limits, Placement, Plan, Stage, StagePlan
from lowmem_flux2.planning.support import EVERYTHING, SUPPORTED, Support
from lowmem_flux2.planning.tiles import TILE_SIDES_PX, tile_is_sound
from lowmem_flux2.planning.workload import Preference, Workload
from lowmem_flux2.units import GIB, format_bytes, format_seconds

TIME_SLACK = 0.15
"""``balanced`` takes the most faithful format whose run is at most this much longer than the fastest plan's."""
H2D_WEIGHT = 0.02
"""Traffic is never quite free, even hidden behind compute: among equally faithful plans, a second of copying counts as
0.02 s, and a second of reading the disk as one, so nothing is read again at each step that could have stayed in memory."""
PREFETCH_DEPTH = 1
CHUNK_TOKENS = (0, 2048, 512)

StreamFrom = Literal["auto", "resident", "pinned", "pageable", "disk"]


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user fixed; "auto" leaves it to the planner. ``batch_size`` 0 is auto; sizes in bytes, None for no cap."""

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
    """The budgets: VRAM less what others hold, RAM less a tenth (at least 1 GiB) for the system, and the user's caps."""
    vram = hardware.vram_bytes - hardware.vram_reserve_bytes + hardware.context_bytes
    ram = hardware.ram_bytes - max(GIB, hardware.ram_bytes // 10)
    if selection.max_vram_bytes is not None:
        vram = min(vram, selection.max_vram_bytes)
    if selection.max_ram_bytes is not None:
        ram = min(ram, selection.max_ram_bytes)
    return Limits(vram_bytes=max(vram, 0), ram_bytes=max(ram, 0))


def make_plan(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    *,
    profile: str,
    support: Support = SUPPORTED,
) -> Plan:
    """The best plan by ``selection.prefer`` among those that fit.

    Plans that ``support`` can carry out are preferred over all others; where none fits, the best plan that a later version
    could run is returned with ``not_executable`` filled.

    Raises:
        UsageError: a format, dtype or cache that this hardware or model cannot use.
        DoesNotFit: no plan fits, executable or not.
    """
    check_selection(selection, hardware)
    limits = limits_of(hardware, selection)
    last: DoesNotFit | None = None
    for allowed in (support, EVERYTHING):
        try:
            stages = _choose_stages(model, workload, hardware, selection, limits, allowed)
        except DoesNotFit as error:
            last = error
            continue
        missing = tuple(dict.fromkeys(word for stage in stages for word in support.missing(stage)))
        return Plan(
            schema_version=SCHEMA_VERSION,
            profile=profile,
            model=model.name,
            prefer=selection.prefer,
            workload=workload,
            hardware=hardware,
            limits=limits,
            stages=stages,
            not_executable=missing,
        )
    assert last is not None
    raise last


def check_selection(selection: Selection, hardware: Hardware) -> None:
    """Refuse names and combinations that can never be honoured, before any enumeration."""
    for flag, value in (
        ("--weight-format", selection.weight_format),
        ("--text-weight-format", selection.text_weight_format),
    ):
        if value != "auto" and value not in FORMATS:
            raise UsageError(f"{flag} {value}: unknown; one of auto, {', '.join(FORMATS)}")
        if value != "auto" and not _runs_on(value, hardware):
            raise UsageError(
                f"{flag} {value}: {hardware.name} has no {value} units (compute capability "
                f"{_capability(hardware)}); use fp16 or auto"
            )
    if selection.dtype != "auto" and selection.dtype not in COMPUTE_DTYPES:
        raise UsageError(f"--dtype {selection.dtype}: unknown; one of auto, {', '.join(COMPUTE_DTYPES)}")
    if selection.dtype == "bf16" and not _runs_on("bf16", hardware):
        raise UsageError(f"--dtype bf16: {hardware.name} has no bf16 units; use fp16")
    if selection.step_cache not in ("auto", "off"):
        raise UsageError(
            f"--step-cache {selection.step_cache}: this version has only 'off' (and 'auto', which picks it)"
        )
    if selection.vae_tile not in ("auto", "off") and not _is_tile(selection.vae_tile):
        raise UsageError(f"--vae-tile {selection.vae_tile}: auto, off, or a multiple of 64 px from 64 to 4096")


def _is_tile(text: str) -> bool:
    return text.isdigit() and 64 <= int(text) <= 4096 and int(text) % 64 == 0


def _capability(hardware: Hardware) -> str:
    return ".".join(map(str, hardware.compute_capability)) if hardware.compute_capability else "none"


def _runs_on(name: str, hardware: Hardware) -> bool:
    least = FORMATS[name].least_capability
    return least is None or hardware.compute_capability is None or hardware.compute_capability >= least


def _compute_dtype(selection: Selection, hardware: Hardware) -> str:
    """bf16 where the hardware has it, else fp16 on a GPU (Turing) and fp32 on a CPU without bf16 units."""
    if selection.dtype != "auto":
        return selection.dtype
    if hardware.device == "cpu":
        return "bf16" if "bf16" in hardware.matmul_flops_per_s else "fp32"
    return "bf16" if _runs_on("bf16", hardware) else "fp16"


def _formats(fixed: str, compute_dtype: str, hardware: Hardware, support: Support) -> list[str]:
    """Formats to try: unquantized weights rest in the compute dtype, since nothing is won by another."""
    if fixed != "auto":
        return [fixed] if fixed in support.weight_formats else []
    plain = {"fp32", "fp16", "bf16"} - {compute_dtype}
    return [
        name for name in FORMATS if name not in plain and name in support.weight_formats and _runs_on(name, hardware)
    ]


# ------------------------------------------------------------------------------------------------- enumeration


def _choose_stages(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    limits: Limits,
    support: Support,
) -> tuple[StagePlan, ...]:
    candidates = {
        "encode": list(_encode_candidates(model, workload, hardware, selection, limits, support)),
        "denoise": list(_denoise_candidates(model, workload, hardware, selection, limits, support)),
        "decode": list(_decode_candidates(model, workload, hardware, selection)),
    }
    fitting: dict[str, list[StagePlan]] = {}
    for name, stages in candidates.items():
        fitting[name] = [stage for stage in stages if _fits(stage, limits)]
        if not fitting[name]:
            raise _does_not_fit(name, stages, limits, workload)
    fastest = {name: min(stage.cost.time_s for stage in stages) for name, stages in fitting.items()}
    slack_s = TIME_SLACK * sum(fastest.values())
    return tuple(
        _choose(fitting[name], candidates[name], fastest[name] + slack_s, selection.prefer, limits, hardware)
        for name in ("encode", "denoise", "decode")
    )


def _fits(stage: StagePlan, limits: Limits) -> bool:
    return stage.cost.peak_vram_bytes <= limits.vram_bytes and stage.cost.peak_ram_bytes <= limits.ram_bytes


def _choose(
    fitting: Sequence[StagePlan],
    everything: Sequence[StagePlan],
    time_limit_s: float,
    prefer: Preference,
    limits: Limits,
    hardware: Hardware,
) -> StagePlan:
    disk_rate, h2d_rate = hardware.disk_read_bytes_per_s, hardware.h2d_pinned_bytes_per_s

    def key(stage: StagePlan) -> tuple[float, ...]:
        cost = stage.cost
        # Microseconds, so that rounding noise never decides; then the smaller footprint; then the larger batch.
        time_us = round(1e6 * (cost.time_s + cost.disk_bytes / disk_rate + H2D_WEIGHT * cost.h2d_bytes / h2d_rate))
        tail = (cost.peak_vram_bytes, cost.peak_ram_bytes, -stage.batch_size)
        if prefer == "quality":
            return (cost.fidelity_error, stage.tile_px > 0, time_us, *tail)
        if prefer == "speed":
            return (time_us, cost.fidelity_error, *tail)
        if prefer == "memory":
            return (cost.peak_vram_bytes, cost.peak_ram_bytes, time_us, cost.fidelity_error)
        return (cost.time_s > time_limit_s, cost.fidelity_error, stage.tile_px > 0, time_us, *tail)

    chosen = min(fitting, key=key)
    return replace(chosen, reasons=_reasons(chosen, fitting, everything, time_limit_s, prefer, limits))


def _encode_candidates(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    limits: Limits,
    support: Support,
) -> Iterator[StagePlan]:
    dtype = _compute_dtype(selection, hardware)
    for name in _formats(selection.text_weight_format, dtype, hardware, support):
        for batch in _batches(workload.num_prompts, 0):
            bare = StagePlan(
                stage="encode",
                component="text_encoder",
                weight_format=name,
                compute_dtype=dtype,
                block_placements=(),
                non_block_placement=Placement.DISK,
                prefetch_depth=PREFETCH_DEPTH,
                slots=0,
                chunk_tokens=0,
                tile_px=0,
                step_cache="off",
                batch_size=batch,
            )
            yield from _placed(bare, model.text_encoder.blocks, model, workload, hardware, selection, limits)


def _denoise_candidates(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    limits: Limits,
    support: Support,
) -> Iterator[StagePlan]:
    dtype = _compute_dtype(selection, hardware)
    chunks = [chunk for chunk in CHUNK_TOKENS if chunk < workload.sequence_tokens]
    for name in _formats(selection.weight_format, dtype, hardware, support):
        for batch in _batches(workload.num_images, selection.batch_size):
            for chunk in chunks if support.chunk_tokens else (0,):
                bare = StagePlan(
                    stage="denoise",
                    component="transformer",
                    weight_format=name,
                    compute_dtype=dtype,
                    block_placements=(),
                    non_block_placement=Placement.GPU,
                    prefetch_depth=PREFETCH_DEPTH,
                    slots=0,
                    chunk_tokens=chunk,
                    tile_px=0,
                    step_cache="off",
                    batch_size=batch,
                )
                yield from _placed(bare, model.transformer.blocks, model, workload, hardware, selection, limits)


def _decode_candidates(
    model: ModelSpec, workload: Workload, hardware: Hardware, selection: Selection
) -> Iterator[StagePlan]:
    dtype = _compute_dtype(selection, hardware)
    tiles = [0] if selection.vae_tile == "off" else [int(selection.vae_tile)] if selection.vae_tile != "auto" else None
    if tiles is None:
        sound = [px for px in TILE_SIDES_PX if tile_is_sound(workload.width, workload.height, px)]
        tiles = [0, *sound]
    for tile in tiles:
        if tile >= max(workload.width, workload.height):
            tile = 0
        stage = StagePlan(
            stage="decode",
            component="vae",
            weight_format=dtype,
            compute_dtype=dtype,
            block_placements=(),
            non_block_placement=Placement.GPU,
            prefetch_depth=0,
            slots=0,
            chunk_tokens=0,
            tile_px=tile,
            step_cache="off",
            batch_size=1,
        )
        yield replace(stage, cost=stage_cost(stage, model, workload, hardware))


def _batches(total: int, fixed: int) -> list[int]:
    """All at once, halves of that, and one by one. The composition of a batch decides pixels, so the plan records it."""
    if fixed:
        return [min(fixed, total)]
    sizes = []
    size = total
    while size > 1:
        sizes.append(size)
        size = -(-size // 2)
    return [*sizes, 1]


def _placed(
    bare: StagePlan,
    blocks: Sequence[BlockSpec],
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    limits: Limits,
) -> Iterator[StagePlan]:
    """The bare stage with all blocks resident, with as many resident as fit, and with none."""
    fmt = FORMATS[bare.weight_format]
    sizes = [fmt.block_bytes(block) for block in blocks]
    slots = min(bare.prefetch_depth + 1, len(blocks))
    order = _residency_order(sizes)

    def priced(resident: int) -> StagePlan:
        placements = _host_tiers(sizes, frozenset(order[:resident]), bare, hardware, selection, limits, slots)
        streamed = resident < len(blocks)
        stage = replace(bare, block_placements=placements, slots=slots if streamed else 0)
        return replace(stage, cost=stage_cost(stage, model, workload, hardware))

    if selection.placement == "resident":
        yield priced(len(blocks))
        return
    if selection.placement == "auto":
        whole = priced(len(blocks))
        yield whole
        if not _fits(whole, limits) or selection.prefer == "memory":
            low, high = 0, len(blocks) - 1
            while low < high:  # the largest resident count that fits: VRAM use grows with it
                middle = (low + high + 1) // 2
                if _fits(priced(middle), limits):
                    low = middle
                else:
                    high = middle - 1
            if low:
                yield priced(low)
    yield priced(0)


def _residency_order(sizes: Sequence[int]) -> list[int]:
    """Largest blocks first (they take longest to copy, and leaving them out shrinks the slots), spread evenly.

    Among equals, indices are visited in bit-reversal-like strides, so that any number of residents is spread over the
    step and the copies between two residents have compute to hide behind.
    """
    order: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        group = [index for index, other in enumerate(sizes) if other == size]
        stride = len(group)
        taken: set[int] = set()
        while len(taken) < len(group):
            for at in range(0, len(group), max(stride, 1)):
                if at not in taken:
                    taken.add(at)
                    order.append(group[at])
            stride //= 2
    return order


def _host_tiers(
    sizes: Sequence[int],
    resident: frozenset[int],
    bare: StagePlan,
    hardware: Hardware,
    selection: Selection,
    limits: Limits,
    slots: int,
) -> tuple[Placement, ...]:
    """Pinned as far as it may be, then pageable, then disk; on a CPU straight to disk, since a copy in RAM wins nothing."""
    from lowmem_flux2.planning.cost import CUDA_HOST_BYTES, LIBRARIES_HOST_BYTES
    from lowmem_flux2.units import MIB

    if selection.placement not in ("auto", "resident"):
        fixed = Placement(selection.placement)
        return tuple(Placement.GPU if index in resident else fixed for index in range(len(sizes)))
    ring = slots * max((size for index, size in enumerate(sizes) if index not in resident), default=0)
    free = limits.ram_bytes - LIBRARIES_HOST_BYTES - CUDA_HOST_BYTES - 256 * MIB - ring
    pinnable = min(hardware.pinnable_bytes - ring, free)
    placements = []
    for index, size in enumerate(sizes):
        if index in resident:
            placements.append(Placement.GPU)
        elif hardware.device == "cpu":
            placements.append(Placement.DISK)
        elif size <= pinnable:
            placements.append(Placement.PINNED)
            pinnable -= size
            free -= size
        elif size <= free:
            placements.append(Placement.PAGEABLE)
            free -= size
        else:
            placements.append(Placement.DISK)
    return tuple(placements)


# ---------------------------------------------------------------------------------------------- reasons, errors


def _reasons(
    chosen: StagePlan,
    fitting: Sequence[StagePlan],
    everything: Sequence[StagePlan],
    time_limit_s: float,
    prefer: Preference,
    limits: Limits,
) -> tuple[str, ...]:
    reasons = []
    error = chosen.cost.fidelity_error
    for name in FORMATS:
        better = [stage for stage in everything if stage.weight_format == name and stage.cost.fidelity_error < error]
        if not better:
            continue
        fits = [stage for stage in better if stage in fitting]
        if not fits:
            least = min(better, key=lambda stage: (stage.cost.peak_vram_bytes, stage.cost.peak_ram_bytes))
            reasons.append(f"not {name}: {_shortfall(least, limits)}")
        else:
            quickest = min(stage.cost.time_s for stage in fits)
            reasons.append(
                f"not {name}: {format_seconds(quickest)} against {format_seconds(chosen.cost.time_s)}, prefer {prefer}"
            )
    total = len(chosen.block_placements)
    if total and chosen.streamed:
        per_block = chosen.cost.slot_bytes // max(chosen.slots, 1)
        reasons.append(
            f"{total - chosen.streamed} of {total} blocks resident, {chosen.streamed} streamed through {chosen.slots} slots "
            f"of {format_bytes(per_block)}: all resident does not fit {_budget(chosen, limits)}"
            if prefer != "memory"
            else f"{chosen.streamed} of {total} blocks streamed: prefer memory"
        )
        waiting = chosen.cost.waiting_s
        share = waiting / chosen.cost.run_s if chosen.cost.run_s else 0.0
        reasons.append(
            "copies hide behind compute"
            if share < 0.02
            else f"compute waits {format_seconds(waiting)} ({share:.0%}) for copies"
        )
    elif total:
        reasons.append(f"all {total} blocks resident: they fit {_budget(chosen, limits)}")
    if chosen.tile_px:
        untiled = next((stage for stage in everything if not stage.tile_px), None)
        if untiled is not None:
            reasons.append(f"tiles of {chosen.tile_px} px: untiled needs {_peak(untiled)}, {_budget(chosen, limits)}")
    elif chosen.stage == "decode":
        reasons.append("untiled: tiles change pixels, and the whole picture fits")
    return tuple(reasons)


def _budget(stage: StagePlan, limits: Limits) -> str:
    if stage.cost.on_host:
        return f"the {format_bytes(limits.ram_bytes)} RAM budget"
    return f"the {format_bytes(limits.vram_bytes)} VRAM budget"


def _peak(stage: StagePlan) -> str:
    if stage.cost.on_host:
        return f"{format_bytes(stage.cost.peak_ram_bytes)} RAM"
    return f"{format_bytes(stage.cost.peak_vram_bytes)} VRAM"


def _shortfall(stage: StagePlan, limits: Limits) -> str:
    if stage.cost.peak_vram_bytes > limits.vram_bytes:
        return f"needs {format_bytes(stage.cost.peak_vram_bytes)} VRAM of {format_bytes(limits.vram_bytes)}"
    return f"needs {format_bytes(stage.cost.peak_ram_bytes)} RAM of {format_bytes(limits.ram_bytes)}"


def _does_not_fit(stage: str, candidates: Sequence[StagePlan], limits: Limits, workload: Workload) -> DoesNotFit:
    """Name the scarcer resource and the least any candidate needs of it."""
    if not candidates:
        return DoesNotFit(stage, "vram", 0, 0)
    vram = min(candidate.cost.peak_vram_bytes for candidate in candidates)
    ram = min(candidate.cost.peak_ram_bytes for candidate in candidates)
    if vram > limits.vram_bytes:
        return DoesNotFit(stage, "vram", vram, limits.vram_bytes)
    if ram > limits.ram_bytes:
        return DoesNotFit(stage, "ram", ram, limits.ram_bytes)
    # Each alone fits, but not both at once: report RAM among those whose VRAM fits.
    both = min(c.cost.peak_ram_bytes for c in candidates if c.cost.peak_vram_bytes <= limits.vram_bytes)
    return DoesNotFit(stage, "ram", both, limits.ram_bytes)
