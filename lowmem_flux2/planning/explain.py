"""A plan in words and numbers: what each stage holds, what it costs, and why it was chosen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem_flux2.planning.batches import batch_sizes
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.units import format_bytes, format_seconds

BAR_WIDTH = 44
_KINDS = (("context", "░"), ("resident", "█"), ("slots", "▓"), ("activations", "▒"), ("margin", "·"))


def explain(plan: Plan) -> RenderableType:
    """One screen: the promise, a bar and a line of reasons for each stage."""
    return Group(_headline(plan), Text(), _stages(plan), *_bars(plan), Text(), *_reasons(plan))


def _headline(plan: Plan) -> Text:
    work = plan.workload
    text = Text()
    text.append(f"{plan.model} on {plan.profile}", style="bold")
    text.append(
        f": {work.num_images} image{'s' if work.num_images > 1 else ''} of {work.width}x{work.height}, "
        f"{work.steps} step{'s' if work.steps > 1 else ''}"
        f"{', two guidance passes' if work.guidance_passes == 2 else ''}, {work.text_tokens} text tokens, "
        f"prefer {plan.prefer}\n"
    )
    promise = [f"peak RAM {format_bytes(plan.peak_ram_bytes)} of {format_bytes(plan.limits.ram_bytes)}"]
    if plan.hardware.device == "cuda":
        promise.insert(0, f"peak VRAM {format_bytes(plan.peak_vram_bytes)} of {format_bytes(plan.limits.vram_bytes)}")
    promise.append(f"about {format_seconds(plan.time_s)}")
    promise.append(
        f"weight error {plan.fidelity_error:.2g}" if plan.fidelity_error else "weights exact (the checkpoint's own)"
    )
    text.append("predicted: " + ", ".join(promise))
    for missing in plan.not_executable:
        text.append(f"\nthis version cannot run it yet: {missing}", style="bold red")
    return text


def _stages(plan: Plan) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("stage", "weights", "compute", "blocks gpu/pin/page/disk", "batch", "load", "run"):
        table.add_column(heading, justify="left" if heading in ("stage", "weights", "compute") else "right")
    for stage in plan.stages:
        counts = "/".join(str(stage.count(placement)) for placement in Placement) if stage.block_placements else "whole"
        if plan.is_cached(stage):
            counts = "from the prompt cache"
        tile = f", tiles {stage.tile_px} px" if stage.tile_px else ""
        table.add_row(
            f"{stage.stage} ({stage.component})",
            stage.weight_format,
            stage.compute_dtype,
            counts + tile,
            str(stage.batch_size),
            format_seconds(stage.cost.load_s),
            format_seconds(stage.cost.run_s),
        )
    return table


def _bars(plan: Plan) -> list[Text]:
    """Memory of the compute device by kind, against the cap."""
    cap = plan.limits.vram_bytes if plan.hardware.device == "cuda" else plan.limits.ram_bytes
    where = "VRAM" if plan.hardware.device == "cuda" else "RAM"
    legend = "  ".join(f"{mark} {kind}" for kind, mark in _KINDS)
    lines = [Text(f"\n{where} against {format_bytes(cap)}:  {legend}", style="dim")]
    for stage in plan.stages:
        cost = stage.cost
        libraries = cost.host_bytes if not cost.on_host else _libraries(stage)
        parts = (
            cost.context_bytes if not cost.on_host else libraries,
            cost.resident_bytes,
            cost.slot_bytes,
            cost.activation_bytes,
            cost.margin_bytes,
        )
        bar = "".join(
            mark * round(BAR_WIDTH * size / cap) for (_, mark), size in zip(_KINDS, parts, strict=True) if cap
        )
        peak = cost.peak_ram_bytes if cost.on_host else cost.peak_vram_bytes
        sizes = ", ".join(f"{kind} {format_bytes(size)}" for (kind, _), size in zip(_KINDS, parts, strict=True) if size)
        lines.append(Text(f"{stage.stage:8}|{bar[:BAR_WIDTH]:{BAR_WIDTH}}| {format_bytes(peak)}: {sizes}"))
    return lines


def _libraries(stage: StagePlan) -> int:
    cost = stage.cost
    return cost.host_bytes - cost.resident_bytes - cost.slot_bytes - cost.activation_bytes - cost.margin_bytes


def _reasons(plan: Plan) -> list[Text]:
    lines = []
    for stage in plan.stages:
        reasons = stage.reasons
        if plan.is_cached(stage):
            reasons = ("all prompts are in the prompt cache: no text encoder is loaded",)
        elif stage.cached_batches:
            batches = len(batch_sizes(plan.workload, stage.batch_size))
            reasons = (f"{stage.cached_batches} of {batches} batches of prompts are in the prompt cache", *reasons)
        lines += [Text(f"{stage.stage}: " + "; ".join(reasons))] if reasons else []
    return lines
