"""Replaying a plan file: nothing in it is believed that the model, the request or the machine can tell.

A plan may have been written by hand, by another version, or on another machine. What contradicts the job is refused;
what follows from the placements (costs, and what this version cannot carry out) is worked out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from lowmem_flux2.errors import PlanMismatch, UsageError
from lowmem_flux2.planning.chunks import CHUNK_STEP_TOKENS
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import COMPONENT_OF, NON_BLOCK_OF, ONE_BY_ONE, Limits, Plan, StagePlan
from lowmem_flux2.planning.preparation import preparations
from lowmem_flux2.planning.selection import TILE_MOST_PX, TILE_STEP_PX, Selection, limits_of, runs_on
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.planning.workload import Request, workload_of
from lowmem_flux2.units import format_bytes


def check_plan(plan: Plan, spec: ModelSpec, source: str = "the plan") -> None:
    """A plan must be one that the executor can take at its word, for this model.

    Raises:
        UsageError: names stage, key and value.
    """
    for stage in plan.stages:
        for key, value, expected in _faults(stage, plan, spec):
            raise UsageError(f"{source}: stage {stage.stage}: {key} is {value}: {expected}")


def check_replay(
    plan: Plan,
    spec: ModelSpec,
    request: Request,
    hardware: Hardware,
    source: str,
    *,
    selection: Selection | None = None,
    free_ram_bytes: int | None = None,
    support: Support = SUPPORTED,
) -> Plan:
    """A replayed plan must have been made for this model and request, and fit this hardware.

    Args:
        selection: its caps bound the peaks; the rest of it is the plan's.
        free_ram_bytes: RAM that is free now, where the plan is to run here.

    Returns:
        The plan as this machine carries it out: same placements; costs, limits and ``not_executable`` worked out anew.

    Raises:
        PlanMismatch: lists each field that differs, plan first.
        UsageError: the plan contradicts itself or the model.
    """
    if plan.decodes_only:
        raise PlanMismatch(f"{source} decodes latents from a file: it is made anew by generate --from-latents FILE")
    differences = [] if plan.model == spec.name else [f"model: plan {plan.model}, here {spec.name}"]
    asked = workload_of(request, spec)
    for each in fields(asked):
        planned, here = getattr(plan.workload, each.name), getattr(asked, each.name)
        if planned != here:
            differences.append(f"{each.name}: plan {_words(planned)}, here {_words(here)}")
    if plan.guidance_scale != request.guidance_scale:
        differences.append(f"guidance: plan {plan.guidance_scale:g}, here {request.guidance_scale:g}")
    if plan.hardware.device != hardware.device:
        differences.append(f"device: plan {plan.hardware.device}, here {hardware.device}")
    if not differences:
        check_plan(plan, spec, source)
        here = _limits(hardware, selection or Selection(), free_ram_bytes)
        plan = _on(plan, spec, hardware, here, support)
        differences = [*_lacking_units(plan, hardware), *_too_large(plan, here)]
    if differences:
        raise PlanMismatch(f"{source} was made for something else:\n  " + "\n  ".join(differences))
    return plan


def _words(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)


def _faults(stage: StagePlan, plan: Plan, spec: ModelSpec) -> Iterator[tuple[str, object, str]]:
    """(key, value, what it must be) of each field that this model or the executor rules out."""
    name, work = stage.stage, plan.workload
    dims = spec.transformer
    blocks = {
        "upsample": spec.text_encoder.num_layers,
        "encode": spec.text_encoder.layers_used,
        "denoise": dims.num_double + dims.num_single,
    }.get(name, 0)
    most = {"upsample": work.num_prompts, "encode": work.num_prompts, "denoise": work.num_images}.get(name, 1)
    depth = max(stage.slots - 1, 0)
    tiled = name in ONE_BY_ONE and stage.tile_px % TILE_STEP_PX == 0 and 0 <= stage.tile_px <= TILE_MOST_PX
    if stage.component != COMPONENT_OF[name]:
        yield "component", stage.component, f"this stage runs the {COMPONENT_OF[name]}"
    if len(stage.block_placements) != blocks:
        yield "block_placements", f"{len(stage.block_placements)} long", f"{spec.name} has {blocks} blocks in it"
    if stage.non_block_placement is not NON_BLOCK_OF[name]:
        yield "non_block_placement", stage.non_block_placement, f"this stage has them in {NON_BLOCK_OF[name]}"
    if not 1 <= stage.batch_size <= most:
        yield "batch_size", stage.batch_size, f"1 to {most}"
    if name == "upsample" and stage.batch_size != most:
        yield "batch_size", stage.batch_size, f"{most}: all prompts are rewritten together"
    # Without a streamed block slots have no size.
    if stage.slots < 0 or (stage.streamed and not 1 <= stage.slots <= max(blocks, 1)):
        yield "slots", stage.slots, f"{stage.streamed} of {blocks} blocks are streamed, each through a slot"
    if stage.prefetch_depth != depth:
        yield "prefetch_depth", stage.prefetch_depth, f"{depth}, one less than the slots"
    if stage.chunk_tokens < 0 or stage.chunk_tokens % CHUNK_STEP_TOKENS or (stage.chunk_tokens and name != "denoise"):
        yield "chunk_tokens", stage.chunk_tokens, f"0, or in the denoise stage a multiple of {CHUNK_STEP_TOKENS}"
    if stage.tile_px and not tiled:
        yield (
            "tile_px",
            stage.tile_px,
            f"0, or in a stage of the VAE a multiple of {TILE_STEP_PX} up to {TILE_MOST_PX}",
        )
    plain = not FORMATS[stage.weight_format].is_quantized
    if (plain or name in ONE_BY_ONE) and stage.weight_format != stage.compute_dtype:
        rest = "unquantized weights rest in the compute dtype" if plain else "the VAE is not quantized"
        yield "weight_format", stage.weight_format, f"{rest}, {stage.compute_dtype}"


def _limits(hardware: Hardware, selection: Selection, free_ram_bytes: int | None) -> Limits:
    limits = limits_of(hardware, selection)
    return limits if free_ram_bytes is None else _least(limits, replace(limits, ram_bytes=free_ram_bytes))


def _least(one: Limits, other: Limits) -> Limits:
    ram = min(one.ram_bytes, other.ram_bytes)
    pinnable = min(one.pinnable_bytes, other.pinnable_bytes, ram)
    return Limits(vram_bytes=min(one.vram_bytes, other.vram_bytes), ram_bytes=ram, pinnable_bytes=pinnable)


def _on(plan: Plan, spec: ModelSpec, hardware: Hardware, here: Limits, support: Support) -> Plan:
    """The same placements priced on this hardware; the budgets it was made for stay where they are lower."""
    # What the prompt cache held when the plan was made says nothing of now.
    bare = [replace(stage, cached_batches=0) for stage in plan.stages]
    stages = tuple(replace(stage, cost=stage_cost(stage, spec, plan.workload, hardware)) for stage in bare)
    return replace(
        plan,
        profile=hardware.name,
        hardware=hardware,
        limits=_least(plan.limits, here),
        stages=stages,
        not_executable=support.missing_of(stages),
        format_changes=(),
        preparations=preparations(stages, spec, hardware, ()),
    )


def _lacking_units(plan: Plan, hardware: Hardware) -> Iterator[str]:
    for stage in plan.stages:
        for name in dict.fromkeys((stage.compute_dtype, stage.weight_format)):
            if not runs_on(name, hardware):
                capability = ".".join(map(str, hardware.compute_capability or ()))
                yield f"{stage.stage}: plan {name}, here compute capability {capability}, which has no {name} units"


def _too_large(plan: Plan, here: Limits) -> Iterator[str]:
    for key, needed, free in (
        ("VRAM", plan.peak_vram_bytes, here.vram_bytes),
        ("RAM", plan.peak_ram_bytes, here.ram_bytes),
    ):
        if needed > free:
            yield f"{key}: plan needs {format_bytes(needed)}, here {format_bytes(free)} free for us"
