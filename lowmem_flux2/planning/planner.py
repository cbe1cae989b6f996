"""Choose a plan: of all that fit, the one that the user's preference rates best (``objective``), exactly.

Stages never hold weights at the same time (staged residency), so each is searched by itself. Two things couple them:
``balanced`` weighs the effort of the whole run against its fidelity, and ``memory`` lowers the peak of the whole run,
so a stage far below that peak has no reason to give up anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.fidelity import fidelity_of
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import (
    balance,
    effort,
    effort_of,
    time_of,
    time_then_effort,
    time_then_effort_of,
    unread,
)
from lowmem_flux2.planning.plan import ONE_BY_ONE, SCHEMA_VERSION, Limits, Plan, Stage, StagePlan, stages_of
from lowmem_flux2.planning.preparation import Prepared, preparations
from lowmem_flux2.planning.reasons import Finer, reasons_of
from lowmem_flux2.planning.residency import Variant
from lowmem_flux2.planning.search import Search, Value
from lowmem_flux2.planning.selection import Selection, StreamFrom, check_selection, limits_of
from lowmem_flux2.planning.support import EVERYTHING, SUPPORTED, Support
from lowmem_flux2.planning.workload import Workload

FINER_STEPS = 100
"""Where speed is preferred, what a more faithful format would take is not worked out to the end: it is a lot of work,
as many of its plans take all but the same time."""

__all__ = ["Selection", "StreamFrom", "limits_of", "make_plan"]


def make_plan(
    model: ModelSpec,
    workload: Workload,
    hardware: Hardware,
    selection: Selection,
    *,
    profile: str,
    guidance_scale: float = 0.0,
    support: Support = SUPPORTED,
    stages: Sequence[Stage] | None = None,
    prepared: Prepared = (),
    with_reasons: bool = True,
) -> Plan:
    """The best plan by ``selection.prefer`` among those that fit.

    What ``support`` can carry out is preferred over all else; a stage of which no such plan fits is planned with what a
    later version could run, and ``not_executable`` filled.

    Args:
        guidance_scale: the request's, to be recorded; planning itself needs only the workload's guidance passes.
        stages: what is left to be done: decode alone, or all if not given.
        prepared: what the prepared store is known to hold of this model; the plan says what must be made beside it.
        with_reasons: False leaves the stages' reasons empty, which is quicker.

    Raises:
        UsageError: a format, dtype or cache that this hardware or model cannot use.
        DoesNotFit: no plan fits, executable or not; of the stages that do not, the one that lacks most.
    """
    check_selection(selection, hardware)
    limits = limits_of(hardware, selection)
    jobs: dict[Stage, Job] = {}
    failures: list[DoesNotFit] = []
    for name in stages or stages_of(workload):
        for allowed in dict.fromkeys((support, EVERYTHING)):
            job = Job(model, workload, hardware, selection, limits, allowed)
            if any(least.fits(limits) for least in job.least(name)):
                jobs[name] = job
                break
        else:
            failures.append(_does_not_fit(name, job, limits))
    if failures:
        raise max(failures, key=lambda failure: failure.needed_bytes - failure.available_bytes)
    chosen, options = choose(jobs) if "denoise" in jobs else _decode_alone(jobs["decode"])
    planned = tuple(jobs[name].priced(stage) for name, stage in chosen.items())
    if with_reasons:
        planned = tuple(replace(stage, reasons=_reasons(stage, jobs[stage.stage], options)) for stage in planned)
    return Plan(
        schema_version=SCHEMA_VERSION,
        profile=profile,
        model=model.name,
        prefer=selection.prefer,
        workload=workload,
        guidance_scale=guidance_scale,
        hardware=hardware,
        limits=limits,
        stages=planned,
        not_executable=support.missing_of(planned),
        preparations=preparations(planned, model, hardware, prepared),
    )


@dataclass(frozen=True, slots=True)
class Option:
    """All variants of a stage of one fidelity, and the search for the best of them."""

    error: float
    unread: int
    weight_format: str
    search: Search


def options_of(job: Job, stage: Stage, value: Value) -> list[Option]:
    """The stage's variants by their fidelity, best first. One search each."""
    groups: dict[tuple[float, str], list[Sequence[Variant]]] = {}
    for family in job.families(stage):
        bare = family[0].bare
        groups.setdefault((fidelity_of(bare, job.workload.steps)[0], bare.weight_format), []).append(family)
    return [
        Option(
            error,
            unread(families[0][0].bare, job.model, job.hardware),
            name,
            Search(families, job.selection.placement, job.limits, value),
        )
        for (error, name), families in sorted(groups.items(), key=lambda item: item[0])
    ]


Options = dict[Stage, list[Option]]


def _decode_alone(job: Job) -> tuple[dict[Stage, StagePlan], Options]:
    """The choice where nothing is left to be done but decoding."""
    prefer = job.selection.prefer
    if prefer == "memory":
        job = _at_the_least({"decode": job})["decode"]
    return {"decode": _of_the_vae(job, "decode", by_time=prefer == "speed")}, {}


def choose(jobs: Mapping[Stage, Job]) -> tuple[dict[Stage, StagePlan], Options]:
    """The best run by the preference of the jobs' selection, not yet priced; each stage has a plan that fits.

    Returns also the options it was chosen from.
    """
    prefer = jobs["denoise"].selection.prefer
    if prefer == "memory":
        jobs = _at_the_least(jobs)
    value = time_then_effort if prefer == "speed" else effort
    whole = {name: _of_the_vae(jobs[name], name, by_time=prefer == "speed") for name in ONE_BY_ONE if name in jobs}
    searched: tuple[Stage, ...] = ("encode", "denoise")
    options = {name: options_of(jobs[name], name, value) for name in searched}
    if prefer == "balanced":
        encode, denoise = _balanced(options["encode"], options["denoise"], tuple(whole.values()))
    elif prefer == "speed":
        encode, denoise = (_least(options[name]) for name in searched)
    else:
        encode, denoise = (_most_faithful(options[name]) for name in searched)
    chosen = {"encode": encode, "denoise": denoise, **whole}
    if "upsample" in jobs:  # by itself: what it takes is no reason for any other stage's format
        alone = options_of(jobs["upsample"], "upsample", value)
        if prefer == "balanced":
            chosen["upsample"] = _balanced_alone(alone)
        else:
            chosen["upsample"] = _least(alone) if prefer == "speed" else _most_faithful(alone)
    return {name: chosen[name] for name in jobs}, options


def _reasons(stage: StagePlan, job: Job, options: Options) -> tuple[str, ...]:
    """Why a stage is what it is; beside it the best in the next more faithful format that fits."""
    finer = [
        option
        for option in options.get(stage.stage, ())
        if option.error < stage.cost.fidelity_error and option.weight_format != stage.weight_format
    ]
    found = None
    if job.selection.prefer != "memory":
        found = next(filter(None, (_finer(option, job) for option in reversed(finer))), None)
    return reasons_of(stage, job, found)


def _finer(option: Option, job: Job) -> Finer | None:
    search = option.search
    if job.selection.prefer == "speed":
        search.advance(FINER_STEPS)
        if search.found is None and search.bound is not None:
            return Finer(option.weight_format, time_of(search.bound) / 1e9, is_exact=False)
    best = search.run()
    return None if best is None else Finer(option.weight_format, job.priced(best).cost.time_s, is_exact=True)


def _of_the_vae(job: Job, name: Stage, by_time: bool) -> StagePlan:
    """Untiled where it fits: tiles change pixels."""
    fitting = [stage for stage in job.tilings(name) if fits(stage, job.limits)]
    if by_time:
        return min(fitting, key=time_then_effort_of)
    return min(fitting, key=lambda stage: (stage.tile_px > 0, effort_of(stage)))


def _most_faithful(options: Sequence[Option]) -> StagePlan:
    return next(stage for option in options if (stage := option.search.run()) is not None)


def _least(options: Sequence[Option]) -> StagePlan:
    """The best of all, whatever its fidelity: the search with the least bound goes on until it has found."""
    while True:
        best = min((option.search for option in options if option.search.bound is not None), key=_bound)
        if best.found is not None:
            return best.found
        best.advance()


def _balanced(
    encodes: Sequence[Option], denoises: Sequence[Option], others: Sequence[StagePlan]
) -> tuple[StagePlan, StagePlan]:
    """The pair of the least balance. Only searches that could still be in it go on, so few are ever opened."""
    pairs = [
        (
            encode.search,
            denoise.search,
            sum(map(effort_of, others)) + encode.unread + denoise.unread,
            (encode.error, denoise.error, *(stage.cost.fidelity_error for stage in others)),
        )
        for encode in encodes
        for denoise in denoises
    ]
    while True:
        encode, denoise, *_ = min(
            (pair for pair in pairs if pair[0].bound is not None and pair[1].bound is not None),
            key=lambda pair: balance(_bound(pair[0]) + _bound(pair[1]) + pair[2], pair[3]),
        )
        if encode.found is not None and denoise.found is not None:
            return encode.found, denoise.found
        for search in (encode, denoise):
            search.advance()


def _balanced_alone(options: Sequence[Option]) -> StagePlan:
    """The least balance of one stage."""
    while True:
        best = min(
            (option for option in options if option.search.bound is not None),
            key=lambda option: balance(_bound(option.search) + option.unread, (option.error,)),
        ).search
        if best.found is not None:
            return best.found
        best.advance()


def _bound(search: Search) -> int:
    assert search.bound is not None
    return search.bound


def _at_the_least(jobs: Mapping[Stage, Job]) -> dict[Stage, Job]:
    """The jobs with no more VRAM than the run needs at the least, and no more RAM than it needs at that."""
    needs = {name: [least for least in job.least(name) if least.fits(job.limits)] for name, job in jobs.items()}
    vram = max(min(least.vram for least in leasts) for leasts in needs.values())
    ram = max(min(least.ram for least in leasts if least.vram <= vram) for leasts in needs.values())
    return {
        name: replace(job, limits=replace(job.limits, vram_bytes=vram, ram_bytes=ram)) for name, job in jobs.items()
    }


def _does_not_fit(stage: Stage, job: Job, limits: Limits) -> DoesNotFit:
    """Name the scarcer resource and the least any candidate needs of it."""
    needs = list(job.least(stage))
    vram = min(least.vram for least in needs)
    if vram > limits.vram_bytes:
        return DoesNotFit(stage, "vram", vram, limits.vram_bytes)
    on_device = [least for least in needs if least.vram <= limits.vram_bytes]
    ram = min(least.ram for least in on_device)
    if ram > limits.ram_bytes:
        return DoesNotFit(stage, "ram", ram, limits.ram_bytes)
    pinned = min(least.pinned for least in on_device if least.ram <= limits.ram_bytes)
    return DoesNotFit(stage, "pinnable ram", pinned, limits.pinnable_bytes)
