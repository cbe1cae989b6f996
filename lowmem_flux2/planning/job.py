"""From what the user typed to a plan: resolve the model, the hardware and the request, then ask the planner.

The command line's ``plan`` and ``generate`` and the Python ``Engine`` all pass here, so they plan alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.advice import closest_fits
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.detect import available_ram_bytes, detect
from lowmem_flux2.planning.hardware import Hardware, load_profile
from lowmem_flux2.planning.nvml import NvmlCard, read_nvml, visible_cards
from lowmem_flux2.planning.plan import Plan, stages_of
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.preparation import Prepared
from lowmem_flux2.planning.replay import check_replay
from lowmem_flux2.planning.selection import Selection, limits_of, with_ram_for
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.planning.workload import Request, workload_of

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware to plan for.

    Args:
        profile: its name, for people.
        detected: it is this machine (then RAM in use now counts).
        argument: what ``--profile`` was given, so that printed commands mean the same machine.
        device: what ``--device`` was given: which card a run takes.
    """

    hardware: Hardware
    profile: str
    detected: bool
    argument: str = AUTO
    device: str = AUTO

    @property
    def device_name(self) -> str:
        """The device that a run takes: ``cpu``, ``cuda`` or ``cuda:1``."""
        return self.hardware.device if self.device == AUTO else self.device


def resolve_machine(profile: str, device: str, max_ram_bytes: int | None = None) -> Machine:
    """Find the hardware: ``auto`` looks at this machine, anything else is a shipped profile or a TOML file.

    A named profile's RAM is an assumption about a typical machine, so ``max_ram_bytes`` replaces it: a machine is
    planned for that has so much for us, besides the system's share.

    Raises:
        ProfileError, UsageError: unknown profile; a device that contradicts it.
    """
    if profile == AUTO:
        hardware = detect(device)
        return Machine(hardware, hardware.name, detected=True, device=device)
    hardware = load_profile(profile)
    if device != AUTO and not device.startswith(hardware.device):
        raise UsageError(f"--device {device} contradicts --profile {profile}, which is a {hardware.device} profile")
    if max_ram_bytes is not None:
        hardware = with_ram_for(hardware, max_ram_bytes)
    return Machine(hardware, hardware.name, detected=False, argument=profile, device=device)


def plan_job(
    source: ModelSource,
    machine: Machine,
    request: Request,
    selection: Selection,
    *,
    support: Support = SUPPORTED,
    running: bool = False,
    decode_images: int | None = None,
    prepared: Prepared = (),
) -> Plan:
    """The plan for a request on a machine.

    Args:
        decode_images: only so many of its images are to be decoded, from latents that are there already.
        running: about to run here. Memory that others hold now is out of reach, and so is what a named profile assumes
            but this machine lacks: the plan keeps to the RAM that is free here and, for a CUDA profile, to the VRAM
            that is free on the card (where NVML sees one).
        prepared: what the prepared store is known to hold of this model.

    Raises:
        UsageError: a selection that cannot be honoured.
        DoesNotFit: with the commands that would fit.
    """
    if decode_images is not None:
        request = replace(request, loras=())  # they have done their part, and their files may be gone
    workload = workload_of(request, source.spec)
    stages = stages_of(workload)
    if decode_images is not None:
        prompts = min(workload.num_prompts, decode_images)
        workload, stages = replace(workload, num_images=decode_images, num_prompts=prompts), ("decode",)
    most = None
    if running:
        most = limits_of(machine.hardware, _within_reach(Selection(), machine))
        selection = _within_reach(selection, machine)
    try:
        return make_plan(
            source.spec,
            workload,
            machine.hardware,
            selection,
            profile=machine.profile,
            guidance_scale=request.guidance_scale,
            support=support,
            stages=stages,
            prepared=prepared,
        )
    except DoesNotFit as error:
        closest: tuple[str, ...]
        if decode_images is not None:
            closest = () if machine.hardware.device == "cpu" else ("the same command with --device cpu",)
        else:
            closest = closest_fits(
                source.spec,
                workload,
                machine.hardware,
                selection,
                machine.argument,
                most=most,
                support=support,
                words=_words(source),
            )
        raise DoesNotFit(error.stage, error.resource, error.needed_bytes, error.available_bytes, closest) from None


def _words(source: ModelSource) -> tuple[str, ...]:
    """What names this model on a command line: a single file with its parts, a hub model with its revision."""
    if (single := source.single) is not None:
        tokenizer = () if single.tokenizer is None else ("--tokenizer", single.tokenizer)
        return "-m", str(single.file), "--text-encoder", single.text_encoder, "--vae", single.vae, *tokenizer
    revision = () if source.revision is None else ("--revision", source.revision)
    return "-m", source.spec.source, *revision


def free_vram_bytes(device: str, cards: Sequence[NvmlCard] | None = None) -> int | None:
    """Memory of the card that ``device`` means which this process could hold now; None where NVML sees no such card."""
    if cards is None:
        cards = visible_cards(read_nvml(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    index = int(device.partition(":")[2] or 0)
    return cards[index].free_bytes + cards[index].own_bytes if index < len(cards) else None


def _within_reach(selection: Selection, machine: Machine) -> Selection:
    """The selection with its caps lowered to what is free on this very machine."""

    def lower(cap: int | None, free: int) -> int:
        return free if cap is None else min(cap, free)

    selection = replace(selection, max_ram_bytes=lower(selection.max_ram_bytes, available_ram_bytes()))
    if machine.hardware.device == "cuda" and not machine.detected:  # a detected card's reserve is what others hold
        free = free_vram_bytes(machine.device)
        if free is not None:
            selection = replace(selection, max_vram_bytes=lower(selection.max_vram_bytes, free))
    return selection


def with_cached(plan: Plan, source: ModelSource, cached_batches: int) -> Plan:
    """The plan where the prompt cache holds so many of the batches that the encode stage would compute.

    Their composition and format are the plan's own, so that what the cache holds changes no pixel.
    """
    stage = replace(plan.stage("encode"), cached_batches=cached_batches)
    stage = replace(stage, cost=stage_cost(stage, source.spec, plan.workload, plan.hardware))
    return replace(plan, stages=tuple(stage if other.stage == "encode" else other for other in plan.stages))


def replay(
    plan: Plan,
    source: ModelSource,
    machine: Machine,
    request: Request,
    path: Path | str,
    selection: Selection | None = None,
) -> Plan:
    """Check that a plan was made for this job and fits this machine.

    Args:
        path: what to call the plan in messages.
        selection: its memory caps hold for the replay too.

    Returns:
        The plan to carry out: its placements, with costs and ``not_executable`` worked out anew.

    Raises:
        PlanMismatch, UsageError: show what differs, or which value is wrong.
    """
    free = available_ram_bytes() if machine.detected else None
    return check_replay(
        plan, source.spec, request, machine.hardware, str(path), selection=selection, free_ram_bytes=free
    )
