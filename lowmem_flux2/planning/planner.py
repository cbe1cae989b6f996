"""Choose a plan: of each stage's candidates that fit, the best by the user's preference.

Stages never hold weights at the same time (staged residency), so each is chosen by itself. Two things couple them:
``balanced`` has one allowance of time for better weights, and ``memory`` lowers the peak of the whole run, so a stage
far below that peak has no reason to give up anything.

    quality   least fidelity error, untiled, then fastest
    balanced  the same, while the run, first read of the weights apart, is at most TIME_SLACK longer than the fastest
    speed     fastest, then least copying and reading, then least fidelity error
    memory    least peak VRAM, then least peak RAM of the run, then as quality
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.candidates import Job, fits, pinning_fits
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import SCHEMA_VERSION, STAGES, Limits, Plan, Stage, StagePlan
from lowmem_flux2.planning.reasons import reasons_of
from lowmem_flux2.planning.selection import Selection, StreamFrom, check_selection, limits_of
from lowmem_flux2.planning.support import EVERYTHING, SUPPORTED, Support
from lowmem_flux2.planning.workload import Preference, Workload

__all__ = ["Objective", "Selection", "StreamFrom", "limits_of", "make_plan"]

TIME_SLACK = 0.15
"""``balanced`` spends at most this share of the fastest run's time on better weights."""
H2D_WEIGHT = 0.1
"""Traffic is never quite free, even hidden behind compute: among equally faithful plans, a second of copying counts as
0.1 s, and a second of reading the disk as one, so nothing is read again at each step that could stay in memory."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Orders the plans of a stage: the least ``key`` is the best.

    Args:
        time_limit_s: for ``balanced``: a plan that takes longer, first read apart, comes after all that do not.
        vram_floor_bytes, ram_floor_bytes: for ``memory``: the run needs these anyway, so lower peaks win nothing.
    """

    prefer: Preference
    hardware: Hardware
    time_limit_s: float = 0.0
    vram_floor_bytes: int = 0
    ram_floor_bytes: int = 0

    def effort_us(self, stage: StagePlan) -> int:
        """Time, disk reads and copies as one number; in microseconds, so that rounding noise never decides."""
        cost = stage.cost
        disk_s = cost.disk_bytes / self.hardware.disk_read_bytes_per_s
        h2d_s = cost.h2d_bytes / self.hardware.h2d_pinned_bytes_per_s
        return round(1e6 * (cost.time_s + disk_s + H2D_WEIGHT * h2d_s))

    def key(self, stage: StagePlan) -> tuple[float, ...]:
        cost = stage.cost
        effort = self.effort_us(stage)
        tail = (cost.peak_vram_bytes, cost.peak_ram_bytes, -stage.batch_size)
        faithful = (cost.fidelity_error, stage.tile_px > 0, effort, *tail)
        if self.prefer == "speed":
            return (round(1e6 * cost.time_s), effort, cost.fidelity_error, *tail)
        if self.prefer == "memory":
            vram = max(cost.peak_vram_bytes, self.vram_floor_bytes)
            return (vram, max(cost.peak_ram_bytes, self.ram_floor_bytes), *faithful)
        if self.prefer == "quality":
            return faithful
        return (cost.steady_s > self.time_limit_s, *faithful)


def make_plan(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    *,
    profile: str,
    guidance_scale: float = 0.0,
    support: Support = SUPPORTED,
) -> Plan:
    """The best plan by ``selection.prefer`` among those that fit.

    What ``support`` can carry out is preferred over all else; a stage of which no such plan fits is planned with what a
    later version could run, and ``not_executable`` filled.

    Args:
        guidance_scale: the request's, to be recorded; planning itself needs only the workload's guidance passes.

    Raises:
        UsageError: a format, dtype or cache that this hardware or model cannot use.
        DoesNotFit: no plan fits, executable or not; of the stages that do not, the one that lacks most.
    """
    check_selection(selection, hardware)
    limits = limits_of(hardware, selection)
    priced: dict[Stage, list[StagePlan]] = {}
    fitting: dict[Stage, list[StagePlan]] = {}
    failures: list[DoesNotFit] = []
    for name in STAGES:
        for allowed in dict.fromkeys((support, EVERYTHING)):
            priced[name] = Job(model, workload, hardware, selection, limits, allowed).candidates(name)
            fitting[name] = [stage for stage in priced[name] if fits(stage, limits)]
            if fitting[name]:
                break
        else:
            failures.append(_does_not_fit(name, priced[name], limits))
    if failures:
        raise max(failures, key=lambda failure: failure.needed_bytes - failure.available_bytes)
    chosen = _choose(fitting, selection.prefer, hardware)
    stages = tuple(
        replace(chosen[name], reasons=reasons_of(chosen[name], priced[name], fitting[name], selection.prefer, limits))
        for name in STAGES
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        profile=profile,
        model=model.name,
        prefer=selection.prefer,
        workload=workload,
        guidance_scale=guidance_scale,
        hardware=hardware,
        limits=limits,
        stages=stages,
        not_executable=support.missing_of(stages),
    )


def _choose(
    fitting: Mapping[Stage, Sequence[StagePlan]], prefer: Preference, hardware: Hardware
) -> dict[Stage, StagePlan]:
    """The denoise stage chooses first: its weights matter most to the picture, so it gets at the allowance first."""
    vram_floor = max(min(stage.cost.peak_vram_bytes for stage in stages) for stages in fitting.values())
    ram_floor = max(
        min(stage.cost.peak_ram_bytes for stage in stages if stage.cost.peak_vram_bytes <= vram_floor)
        for stages in fitting.values()
    )
    fastest_s = {name: min(stage.cost.steady_s for stage in stages) for name, stages in fitting.items()}
    slack_s = TIME_SLACK * sum(fastest_s.values())
    chosen: dict[Stage, StagePlan] = {}
    for name in sorted(fitting, key=lambda stage: stage != "denoise"):
        objective = Objective(prefer, hardware, fastest_s[name] + slack_s, vram_floor, ram_floor)
        chosen[name] = min(fitting[name], key=objective.key)
        slack_s -= chosen[name].cost.steady_s - fastest_s[name]
    return chosen


def _does_not_fit(stage: str, candidates: Sequence[StagePlan], limits: Limits) -> DoesNotFit:
    """Name the scarcer resource and the least any candidate needs of it."""
    vram = min(candidate.cost.peak_vram_bytes for candidate in candidates)
    if vram > limits.vram_bytes:
        return DoesNotFit(stage, "vram", vram, limits.vram_bytes)
    on_device = [candidate for candidate in candidates if candidate.cost.peak_vram_bytes <= limits.vram_bytes]
    ram = min(candidate.cost.peak_ram_bytes for candidate in on_device)
    if ram > limits.ram_bytes:
        return DoesNotFit(stage, "ram", ram, limits.ram_bytes)
    unpinnable = [candidate for candidate in on_device if not pinning_fits(candidate, limits)]
    pinned = min(candidate.cost.host_pinned_bytes for candidate in unpinnable)
    return DoesNotFit(stage, "pinnable ram", pinned, limits.pinnable_bytes)
