"""A plan file is checked against model, request and machine before it runs, and its numbers are worked out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machines import DEV, KLEIN_4B, KLEIN_9B, SUPPORTED, machine, plan_for, spec

from lowmem_flux2.errors import PlanMismatch, UsageError
from lowmem_flux2.planning.plan import Placement, Plan, Stage
from lowmem_flux2.planning.replay import check_plan, check_replay
from lowmem_flux2.planning.selection import Selection, limits_of
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.planning.workload import Request, make_request
from lowmem_flux2.units import GIB


@pytest.fixture
def plan() -> Plan:
    return replace(plan_for(DEV, "rtx-3060-12gb", 32), guidance_scale=4.0)


def asked(px: int = 1024, guidance: float = 4.0, name: str = DEV) -> Request:
    return make_request(spec(name), ("x",), width=px, height=px, guidance_scale=guidance)


def edited(plan: Plan, stage: Stage, **changes: Any) -> Plan:
    stages = tuple(replace(one, **changes) if one.stage == stage else one for one in plan.stages)
    return replace(plan, stages=stages)


# -------------------------------------------------------------------------------------------------- the plan alone


@pytest.mark.parametrize("name", [DEV, KLEIN_4B, KLEIN_9B])
@pytest.mark.parametrize("profile", ["rtx-3060-12gb", "rtx-2060-6gb", "cpu"])
@pytest.mark.parametrize("prefer", ["quality", "memory"])
def test_every_plan_that_is_made_is_sound(name: str, profile: str, prefer: Any) -> None:
    ram = 48 if profile == "cpu" else None
    check_plan(plan_for(name, profile, ram, images=3, prompts=2, selection=Selection(prefer=prefer)), spec(name))


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        ("denoise", "block_placements", (Placement.DISK,) * 55),
        ("encode", "block_placements", ()),
        ("decode", "block_placements", (Placement.GPU,)),
        ("encode", "batch_size", 0),
        ("denoise", "batch_size", 2),
        ("encode", "batch_size", 2),
        ("denoise", "slots", 0),
        ("denoise", "slots", -1),
        ("denoise", "slots", 1000),
        ("denoise", "prefetch_depth", 7),
        ("encode", "non_block_placement", Placement.GPU),
        ("denoise", "non_block_placement", Placement.PINNED),
        ("decode", "non_block_placement", Placement.DISK),
        ("denoise", "chunk_tokens", -64),
        ("denoise", "chunk_tokens", 100),
        ("encode", "chunk_tokens", 512),
        ("decode", "tile_px", 100),
        ("decode", "tile_px", -64),
        ("encode", "tile_px", 512),
        ("denoise", "component", "vae"),
        ("denoise", "weight_format", "fp16"),
        ("decode", "weight_format", "fp8"),
    ],
)
def test_a_value_that_the_executor_would_not_honour_is_named(plan: Plan, stage: Stage, key: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"x.json: stage {stage}: {key} is ") as caught:
        check_replay(edited(plan, stage, **{key: value}), spec(DEV), asked(), plan.hardware, "x.json")
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------------------------------------------------- replay


def test_a_plan_replays_as_it_is_where_it_was_made(plan: Plan) -> None:
    assert check_replay(plan, spec(DEV), asked(), plan.hardware, "x.json", support=SUPPORTED) == plan


def test_a_plan_replays_on_a_larger_machine_of_the_kind(plan: Plan) -> None:
    larger = machine("rtx-4090-24gb", 64)
    found = check_replay(plan, spec(DEV), asked(), larger, "x.json")
    assert (found.hardware, found.profile, found.digest) == (larger, "rtx-4090-24gb", plan.digest)
    assert found.limits == plan.limits
    assert found.time_s < plan.time_s


@pytest.mark.parametrize(
    ("model", "px", "guidance", "profile", "differences"),
    [
        (KLEIN_9B, 1024, 4.0, "rtx-3060-12gb", ["model: plan flux2-dev, here flux2-klein-9b"]),
        (DEV, 512, 4.0, "rtx-3060-12gb", ["width: plan 1024, here 512", "image_tokens: plan 4096, here 1024"]),
        (DEV, 1024, 2.5, "rtx-3060-12gb", ["guidance: plan 4, here 2.5"]),
        (DEV, 1024, 4.0, "rtx-2060-6gb", ["VRAM: plan needs", "RAM: plan needs", "denoise: plan bf16"]),
        (DEV, 1024, 4.0, "cpu", ["device: plan cuda, here cpu"]),
    ],
)
def test_a_mismatch_shows_each_difference(
    plan: Plan, model: str, px: int, guidance: float, profile: str, differences: list[str]
) -> None:
    with pytest.raises(PlanMismatch) as caught:
        check_replay(plan, spec(model), asked(px, guidance), machine(profile), "x.json")
    assert str(caught.value).startswith("x.json was made for something else")
    for difference in differences:
        assert difference in str(caught.value)


def test_what_others_hold_is_not_there_for_a_replay(plan: Plan) -> None:
    hardware = plan.hardware
    least = plan.peak_vram_bytes - hardware.context_bytes
    assert least < hardware.vram_bytes
    busy = replace(hardware, vram_reserve_bytes=hardware.vram_bytes - least + 1)
    with pytest.raises(PlanMismatch, match="VRAM: plan needs"):
        check_replay(plan, spec(DEV), asked(), busy, "x.json")
    check_replay(plan, spec(DEV), asked(), hardware, "x.json", free_ram_bytes=plan.peak_ram_bytes)
    with pytest.raises(PlanMismatch, match=" RAM: plan needs"):
        check_replay(plan, spec(DEV), asked(), hardware, "x.json", free_ram_bytes=plan.peak_ram_bytes - 1)
    with pytest.raises(PlanMismatch, match="VRAM: plan needs"):
        check_replay(plan, spec(DEV), asked(), hardware, "x.json", selection=Selection(max_vram_bytes=2 * GIB))


def test_costs_that_the_file_states_are_not_believed(plan: Plan) -> None:
    placements = (Placement.GPU,) * 56
    lie = edited(plan, "denoise", block_placements=placements, slots=0, prefetch_depth=0, cost=StageCost())
    with pytest.raises(PlanMismatch, match="VRAM: plan needs"):
        check_replay(lie, spec(DEV), asked(), plan.hardware, "x.json")
    wide = replace(plan, limits=replace(plan.limits, vram_bytes=1 << 60))
    found = check_replay(wide, spec(DEV), asked(), plan.hardware, "x.json")
    assert found.limits.vram_bytes == limits_of(plan.hardware, Selection()).vram_bytes


def test_what_cannot_be_carried_out_is_worked_out_and_not_believed(plan: Plan) -> None:
    used = plan.stage("denoise").weight_format
    lacking = replace(SUPPORTED, weight_formats=SUPPORTED.weight_formats - {used})
    assert plan.not_executable == ()
    found = check_replay(plan, spec(DEV), asked(), plan.hardware, "x.json", support=lacking)
    assert f"transformer weights in {used}" in found.not_executable
    accused = replace(plan, not_executable=("anything",))
    assert check_replay(accused, spec(DEV), asked(), plan.hardware, "x.json", support=SUPPORTED).not_executable == ()
