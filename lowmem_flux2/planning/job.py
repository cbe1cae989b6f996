"""From what the user typed to a plan: resolve the model, the hardware and the request, then ask the planner.

The command line's ``plan`` and ``generate`` and the Python ``Engine`` all pass here, so they plan alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.advice import closest_fits
from lowmem_flux2.planning.detect import available_ram_bytes, detect
from lowmem_flux2.planning.hardware import Hardware, load_profile
from lowmem_flux2.planning.plan import Plan, check_replay
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.selection import Selection, with_ram_for
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
    """

    hardware: Hardware
    profile: str
    detected: bool
    argument: str = AUTO


def resolve_machine(profile: str, device: str, max_ram_bytes: int | None = None) -> Machine:
    """Find the hardware: ``auto`` looks at this machine, anything else is a shipped profile or a TOML file.

    A named profile's RAM is an assumption about a typical machine, so ``max_ram_bytes`` replaces it: a machine is
    planned for that has so much for us, besides the system's share.

    Raises:
        ProfileError, UsageError: unknown profile; a device that contradicts it.
    """
    if profile == AUTO:
        hardware = detect(device)
        return Machine(hardware, hardware.name, detected=True)
    hardware = load_profile(profile)
    if device != AUTO and not device.startswith(hardware.device):
        raise UsageError(f"--device {device} contradicts --profile {profile}, which is a {hardware.device} profile")
    if max_ram_bytes is not None:
        hardware = with_ram_for(hardware, max_ram_bytes)
    return Machine(hardware, hardware.name, detected=False, argument=profile)


def plan_job(
    source: ModelSource,
    machine: Machine,
    request: Request,
    selection: Selection,
    *,
    support: Support = SUPPORTED,
    running: bool = False,
) -> Plan:
    """The plan for a request on a machine.

    Args:
        running: about to run here, so RAM that others hold now is out of reach.

    Raises:
        UsageError: a selection that cannot be honoured.
        DoesNotFit: with the commands that would fit.
    """
    workload = workload_of(request, source.spec)
    if running and machine.detected:
        reachable = available_ram_bytes()
        cap = selection.max_ram_bytes
        selection = replace(selection, max_ram_bytes=reachable if cap is None else min(cap, reachable))
    try:
        return make_plan(source.spec, workload, machine.hardware, selection, profile=machine.profile, support=support)
    except DoesNotFit as error:
        closest = closest_fits(source.spec, workload, machine.hardware, selection, machine.argument, support=support)
        raise DoesNotFit(error.stage, error.resource, error.needed_bytes, error.available_bytes, closest) from None


def replay(plan: Plan, source: ModelSource, machine: Machine, request: Request, path: Path) -> Plan:
    """Check that a plan file was made for this job, and return it.

    Raises:
        PlanMismatch: shows what differs.
    """
    check_replay(plan, source.spec.name, workload_of(request, source.spec), machine.hardware, str(path))
    return plan
