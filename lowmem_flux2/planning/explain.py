"""A plan in words and numbers, on one screen: what each stage holds, how a step goes, what it costs, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lowmem_flux2.planning.adapters import kept_bytes
from lowmem_flux2.planning.bars import bars, device_parts, host_parts, legend, step_lanes
from lowmem_flux2.planning.batches import batch_sizes
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.formats import DTYPE_BYTES
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.planning.reference_keys import kept_keys_bytes
from lowmem_flux2.planning.upsampling import NEW_TOKENS
from lowmem_flux2.planning.workload import token_counts
from lowmem_flux2.units import GIB, format_bytes, format_seconds

NARROW = 96
"""Columns below which the table has less space between its own, and breaks what says where blocks are."""
BOTTLENECK_WORDS = {"compute": "compute", "link": "h2d link", "disk": "disk", "load": "loading"}


def explain(plan: Plan, model: ModelSpec, improvements: Sequence[str] = ()) -> RenderableType:
    """The promise, the stages, a bar of memory for each, a step's time line, the reasons.

    Args:
        improvements: what would help, see ``improvements``.
    """
    words = _reasons(plan)
    if improvements:
        words.append(Text("what would help: " + "; ".join(improvements), style="bold"))
    return Group(_headline(plan, model), Text(), _Drawn(plan, model), Text(), *words)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The table, bars and lanes, as wide as the terminal has room for."""

    plan: Plan
    model: ModelSpec

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = options.max_width
        yield _stages(self.plan, is_narrow=columns < NARROW)
        yield Text()
        yield from _bars(self.plan, columns)
        yield Text()
        yield from map(Text, step_lanes(self.plan, self.model, columns))


def _headline(plan: Plan, model: ModelSpec) -> Text:
    work = plan.workload
    text = Text()
    text.append(f"{plan.model} on {plan.profile}", style="bold")
    if plan.hardware.calibrated:
        text.append(f" (calibrated {plan.hardware.calibrated})")
    text.append(f": {work.num_images} image{'s' if work.num_images > 1 else ''} of {work.width}x{work.height}, ")
    if plan.decodes_only:
        text.append("denoised already, ")
    else:
        text.append(
            f"{work.steps} step{'s' if work.steps > 1 else ''}"
            f"{', two guidance passes' if work.guidance_passes == 2 else ''}, {work.text_tokens} text tokens, "
        )
    text.append(f"prefer {plan.prefer}\n")
    promise = [f"peak RAM {_of(plan.peak_ram_bytes, plan.limits.ram_bytes)}", f"about {format_seconds(plan.time_s)}"]
    if plan.hardware.device == "cuda":
        promise.insert(0, f"peak VRAM {_of(plan.peak_vram_bytes, plan.limits.vram_bytes)}")
    if not plan.decodes_only:
        promise.append(f"weight error {plan.fidelity_error:.2g}" if plan.fidelity_error else "weights exact")
    text.append("predicted: " + ", ".join(promise))
    if work.upsample_temperature is not None and not plan.decodes_only:
        text.append(f"\ncaptions upsampled at temperature {work.upsample_temperature:g}: up to {NEW_TOKENS} tokens")
    if plan.workload.references and not plan.decodes_only:
        text.append(f"\n{reference_words(plan, model)}")
    for adapter in work.adapters:
        size = format_bytes(kept_bytes([adapter], DTYPE_BYTES[plan.stage("denoise").compute_dtype]))
        keys = f"{adapter.matched} of {adapter.matched + adapter.unmatched} keys"
        text.append(f"\nLoRA {adapter.name} at {adapter.scale:g}: {keys}, {size} beside the weights")
    if plan.preparations:
        made = " and ".join(f"{each.component} in {each.weight_format}" for each in plan.preparations)
        written = format_bytes(sum(each.write_bytes for each in plan.preparations))
        text.append(
            f"\nbefore the first run: prepare {made}, about {format_seconds(plan.prepare_s)}, {written} of disk"
        )
    for missing in plan.not_executable:
        text.append(f"\nthis version cannot run it yet: {missing}", style="bold red")
    return text


def reference_words(plan: Plan, model: ModelSpec) -> str:
    """What each reference image costs: its tokens, and what all of them add to a step and to its activations."""
    work, stage = plan.workload, plan.stage("denoise")
    counts = token_counts(work.references, model.size_multiple)
    each = ", ".join(
        f"{width}x{height} {tokens} tokens" for (width, height), tokens in zip(work.references, counts, strict=True)
    )
    plural = "s" if len(counts) > 1 else ""
    bare_work = replace(work, references=(), reference_tokens=0, caches_references=False)
    without = stage_cost(stage, model, bare_work, plan.hardware)
    step, bare = (format_seconds(cost.compute_s / work.steps) for cost in (stage.cost, without))
    live, alone = (format_bytes(cost.activation_bytes) for cost in (stage.cost, without))
    if work.caches_references:
        kept = kept_keys_bytes(model, work, stage.batch_size, DTYPE_BYTES[stage.compute_dtype])
        return (
            f"{len(counts)} reference image{plural}: {each}; the first step computes {work.sequence_tokens} tokens, "
            f"the others {work.step_tokens}, and keeps their keys and values, {format_bytes(kept)}; a step computes "
            f"{step} in the mean, not {bare}; activations {live}, not {alone}"
        )
    return (
        f"{len(counts)} reference image{plural}: {each}; a step sees {work.sequence_tokens} tokens, not "
        f"{work.sequence_tokens - work.reference_tokens}, and computes {step}, not {bare}; "
        f"activations {live}, not {alone}"
    )


def _of(part_bytes: int, whole_bytes: int) -> str:
    return f"{part_bytes / GIB:.2f}/{whole_bytes / GIB:.2f} GiB"


def _stages(plan: Plan, *, is_narrow: bool) -> Table:
    table = Table(show_edge=False, pad_edge=False, box=None, collapse_padding=is_narrow)
    left = ("stage", "weights", "compute", "most time")
    where = "gpu/pin/ page/disk" if is_narrow else "gpu/pin/page/disk"
    for heading in ("stage", "weights", "compute", where, "batch", "load", "run", "most time"):
        is_whole = heading != where or not is_narrow
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=is_whole)
    for stage in plan.stages:
        counts = "/".join(str(stage.count(placement)) for placement in Placement) if stage.block_placements else "whole"
        if plan.is_cached(stage):
            counts = "from the prompt cache"
        options = [f"tiles {stage.tile_px} px"] if stage.tile_px else []
        options += [f"chunks {stage.chunk_tokens}"] if stage.chunk_tokens else []
        options += ["cache"] if stage.step_cache != "off" else []
        table.add_row(
            stage.stage,
            stage.weight_format,
            stage.compute_dtype,
            ", ".join([counts, *options]),
            str(stage.batch_size),
            format_seconds(stage.cost.load_s),
            format_seconds(stage.cost.run_s),
            BOTTLENECK_WORDS[stage.cost.bottleneck],
        )
    return table


def _bars(plan: Plan, columns: int) -> list[Text]:
    """Memory by kind against the budget: the compute device's, and beside a GPU the host's."""
    on_gpu = plan.hardware.device == "cuda"
    budgets = [("VRAM", plan.limits.vram_bytes, device_parts), ("RAM", plan.limits.ram_bytes, host_parts)]
    lines = []
    for where, cap, parts in budgets if on_gpu else [("RAM", plan.limits.ram_bytes, device_parts)]:
        lines.append(Text(f"{where} of {format_bytes(cap)}:  {legend(parts(plan.stages[0]))}", style="dim"))
        lines += map(Text, bars([(stage.stage, parts(stage)) for stage in plan.stages], cap, columns))
    return lines


EXPANDING_SHARE = 0.05
"""Of a stage's run; less is not worth a word."""


def _expanding(stage: StagePlan) -> list[str]:
    """What expanding its weights takes of a stage, where it counts."""
    cost = stage.cost
    if cost.expand_s <= EXPANDING_SHARE * cost.run_s:
        return []
    return [f"expanding {stage.weight_format}: {format_seconds(cost.expand_s)} ({cost.expand_s / cost.run_s:.0%})"]


def _reasons(plan: Plan) -> list[Text]:
    lines = []
    for stage in plan.stages:
        reasons = stage.reasons
        if plan.is_cached(stage):
            reasons = ("all prompts are in the prompt cache: no text encoder is loaded",)
        elif stage.cached_batches:
            batches = len(batch_sizes(plan.workload, stage.batch_size))
            reasons = (f"{stage.cached_batches} of {batches} batches of prompts are in the prompt cache", *reasons)
        reasons = (*reasons, *_expanding(stage))
        lines += [Text(f"{stage.stage}: " + "; ".join(reasons))] if reasons else []
    return lines
