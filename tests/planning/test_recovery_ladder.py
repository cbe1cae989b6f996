"""The recovery ladder: each rung needs less of what ran out, and changes nothing that has been computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machines import DEV, KLEIN_4B, MODELS, SUPPORTED, plan_for, spec

from lowmem_flux2.planning.candidates import fits
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.ladder import Resource, next_format, next_rung, peak_bytes
from lowmem_flux2.planning.plan import Placement, Plan, Stage
from lowmem_flux2.planning.selection import Selection


def climb(plan: Plan, stage: Stage, resource: Resource) -> list[Plan]:
    """The plan and every rung below it."""
    rungs = [plan]
    while (lower := next_rung(rungs[-1], stage, spec(plan.model), SUPPORTED, resource)) is not None:
        rungs.append(lower)
        assert len(rungs) < 60
    return rungs


@pytest.mark.parametrize("resource", ["device", "host"])
@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
@pytest.mark.parametrize(("profile", "ram"), [("rtx-3060-12gb", 64), ("rtx-4090-24gb", 32), ("cpu", 64)])
@pytest.mark.parametrize("name", MODELS)
def test_every_rung_is_lower_and_keeps_what_decides_pixels(
    name: str, profile: str, ram: int, stage: Stage, resource: Resource
) -> None:
    plan = plan_for(name, profile, ram)
    rungs = climb(plan, stage, resource)
    peaks = [peak_bytes(rung.stage(stage), resource) for rung in rungs]
    assert peaks == sorted(set(peaks), reverse=True)
    for rung in rungs:
        planned = rung.stage(stage)
        assert fits(planned, plan.limits)
        assert planned.weight_format == plan.stage(stage).weight_format
        assert planned.batch_size == plan.stage(stage).batch_size
        assert planned.step_cache == plan.stage(stage).step_cache
        assert [other for other in rung.stages if other.stage != stage] == [
            other for other in plan.stages if other.stage != stage
        ]


def test_without_ram_blocks_go_to_disk_and_stay_off_the_card() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 64, selection=Selection(weight_format="int8"))
    assert plan.stage("denoise").count(Placement.DISK) == 0
    last = climb(plan, "denoise", "host")[-1].stage("denoise")
    assert last.count(Placement.PINNED) == last.count(Placement.PAGEABLE) == 0
    assert last.count(Placement.DISK) > 0
    assert last.cost.peak_ram_bytes < plan.stage("denoise").cost.peak_ram_bytes / 5
    assert last.cost.peak_vram_bytes <= plan.limits.vram_bytes


def test_rungs_count_on_what_is_cached() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 64, prompts=8, selection=Selection(text_weight_format="bf16"))
    encode = replace(plan.stage("encode"), batch_size=1, cached_batches=7)
    priced = replace(encode, cost=stage_cost(encode, spec(DEV), plan.workload, plan.hardware))
    plan = replace(plan, stages=(priced, *plan.stages[1:]))
    rungs = climb(plan, "encode", "device")
    assert len(rungs) > 1
    assert {rung.stage("encode").cached_batches for rung in rungs} == {7}


@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_formats_get_smaller_and_no_better(stage: Stage) -> None:
    plan = plan_for(KLEIN_4B, "rtx-3060-12gb", 64, selection=Selection(weight_format="bf16", text_weight_format="bf16"))
    plan = climb(plan, stage, "device")[-1]
    formats = [plan.stage(stage).weight_format]
    while (lower := next_format(plan, stage, spec(KLEIN_4B), SUPPORTED)) is not None:
        assert peak_bytes(lower.stage(stage)) < peak_bytes(plan.stage(stage))
        assert lower.stage(stage).batch_size == plan.stage(stage).batch_size
        formats.append(lower.stage(stage).weight_format)
        plan = climb(lower, stage, "device")[-1]
    errors = [FORMATS[name].weight_error for name in formats]
    assert formats[:2] == ["bf16", "int8"]
    assert errors == sorted(errors)


def test_what_is_not_prepared_is_passed_over() -> None:
    plan = climb(
        plan_for(KLEIN_4B, "rtx-3060-12gb", 64, selection=Selection(weight_format="bf16")), "denoise", "device"
    )
    prepared = replace(SUPPORTED, weight_formats=frozenset({"bf16", "nf4"}))
    lower = next_format(plan[-1], "denoise", spec(KLEIN_4B), prepared)
    assert lower is not None
    assert lower.stage("denoise").weight_format == "nf4"
    assert (
        next_format(plan[-1], "denoise", spec(KLEIN_4B), replace(prepared, weight_formats=frozenset({"bf16"}))) is None
    )
