"""Plans keep to their limits, are the best by their own objective, and honour or refuse every flag."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from everything import everything
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import (
    DEV,
    KLEIN_4B,
    KLEIN_9B,
    KLEIN_BASE,
    MODELS,
    PREFERENCES,
    SUPPORTED,
    UNQUANTIZED,
    machine,
    plan_for,
    plan_supported,
    spec,
    work,
)

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.hardware import list_profiles
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import Objective, effort_of, time_then_effort_of
from lowmem_flux2.planning.plan import STAGES, Limits, Placement, Plan, StagePlan
from lowmem_flux2.planning.planner import limits_of, make_plan
from lowmem_flux2.planning.selection import Selection, with_ram_for
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import GIB, MIB

SMALL_AND_LARGE = ("rtx-2060-6gb", "rtx-3060-12gb", "rtx-4090-24gb", "h100-80gb", "cpu")


def assert_within(plan: Plan, limits: Limits) -> None:
    assert plan.limits == limits
    assert plan.peak_vram_bytes <= limits.vram_bytes
    assert plan.peak_ram_bytes <= limits.ram_bytes
    for stage in plan.stages:
        if stage.count(Placement.PINNED):
            assert stage.cost.host_pinned_bytes <= limits.pinnable_bytes


# ---------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize("profile", list_profiles())
def test_every_profile_plans_within_its_limits_or_says_what_is_short(profile: str) -> None:
    for name in MODELS:
        for px, ram_gib in ((512, None), (1024, None), (2048, None), (1024, 4), (1024, 1)):
            hardware = machine(profile, ram_gib)
            selection = Selection(max_ram_bytes=None if ram_gib is None else ram_gib * GIB)
            limits = limits_of(hardware, selection)
            try:
                plan = plan_supported(spec(name), work(name, px), hardware, selection, profile=profile)
            except DoesNotFit as error:
                assert error.needed_bytes > error.available_bytes
                continue
            assert_within(plan, limits)
            assert plan.not_executable == tuple(word for stage in plan.stages for word in SUPPORTED.missing(stage))
            for stage in plan.stages:
                assert stage.cost == stage_cost(stage, spec(name), plan.workload, hardware)
                assert stage.reasons
                assert "bf16" not in (stage.weight_format, stage.compute_dtype) or not profile.startswith("rtx-20")


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("profile", SMALL_AND_LARGE)
def test_planning_is_deterministic(profile: str, prefer: Preference) -> None:
    plans = [plan_for(KLEIN_9B, profile, 32, images=3, selection=Selection(prefer=prefer)) for _ in range(2)]
    assert plans[0] == plans[1]


def test_a_6_gb_turing_card_runs_dev_in_fp16() -> None:
    plan = plan_for(DEV, "rtx-2060-6gb")
    assert {stage.compute_dtype for stage in plan.stages} == {"fp16"}
    assert plan.peak_vram_bytes <= 5.6 * GIB


def test_a_large_card_holds_klein_whole_for_many_steps() -> None:
    stage = plan_supported(
        spec(KLEIN_4B), work(KLEIN_4B, steps=50), machine("h100-80gb"), Selection(), profile="h100-80gb"
    ).stage("denoise")
    assert stage.streamed == stage.slots == stage.prefetch_depth == 0


def test_one_pass_over_the_text_encoder_loads_nothing_that_it_could_stream() -> None:
    encode = plan_for(DEV, "rtx-3060-12gb", 64).stage("encode")
    assert encode.cost.load_s < 2
    assert encode.count(Placement.DISK) == 30


# ------------------------------------------------------------------------------------------------- preferences


def short(layers: int, double: int, single: int) -> ModelSpec:
    """Klein-4b with so few blocks that every plan can be tried."""
    model = spec(KLEIN_4B)
    return replace(
        model,
        text_encoder=replace(model.text_encoder, out_layers=(layers,)),
        transformer=replace(model.transformer, num_double=double, num_single=single),
    )


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize(
    ("vram_mib", "ram_mib"), [(1700, 1500), (1700, 3000), (2200, 1800), (2600, 4000), (9000, 9000)]
)
@pytest.mark.parametrize("profile", ["rtx-3060-12gb", "cpu"])
def test_no_run_of_all_that_fit_is_rated_better(profile: str, vram_mib: int, ram_mib: int, prefer: Preference) -> None:
    model, workload = short(3, 1, 3), work(KLEIN_4B, 512)
    hardware = replace(machine(profile), matmul_flops_per_s=dict.fromkeys(("fp32", "bf16", "int8"), 4e12))
    support = replace(EVERYTHING, weight_formats=frozenset({"bf16", "int8", "nf4"}))
    selection = Selection(prefer=prefer, max_vram_bytes=vram_mib * MIB, max_ram_bytes=ram_mib * MIB)
    plan = make_plan(model, workload, hardware, selection, profile=profile, support=support)
    job = Job(model, workload, hardware, selection, limits_of(hardware, selection), support)
    every = {
        "encode": list(everything(job, "encode")),
        "denoise": list(everything(job)),
        "decode": job.tilings("decode"),
    }
    # Of plans that are alike in what else counts, those of the least time and of the least effort suffice.
    few = [thinned([stage for stage in every[name] if fits(stage, job.limits)]) for name in STAGES]
    rating = Objective(prefer, model, hardware).rating
    assert rating(plan.stages) == min(map(rating, product(*few)))


def thinned(stages: list[StagePlan]) -> list[StagePlan]:
    best: dict[Any, StagePlan] = {}
    for stage in stages:
        cost = stage.cost
        for key in (time_then_effort_of, effort_of):
            alike = key, cost.peak_vram_bytes, cost.peak_ram_bytes, cost.fidelity_error, stage.tile_px
            best[alike] = min(best.get(alike, stage), stage, key=key)
    return list({id(stage): stage for stage in best.values()}.values())


@pytest.mark.parametrize("profile", SMALL_AND_LARGE)
@pytest.mark.parametrize("name", [DEV, KLEIN_BASE])
def test_each_preference_is_best_at_what_it_prefers(name: str, profile: str) -> None:
    plans = {prefer: plan_for(name, profile, 32, selection=Selection(prefer=prefer)) for prefer in PREFERENCES}
    assert min(plans.values(), key=lambda plan: plan.time_s).time_s == pytest.approx(plans["speed"].time_s, abs=1e-5)
    assert plans["quality"].fidelity_error == min(plan.fidelity_error for plan in plans.values())
    assert plans["memory"].peak_vram_bytes == min(plan.peak_vram_bytes for plan in plans.values())
    if profile == "cpu":
        assert plans["memory"].peak_ram_bytes == min(plan.peak_ram_bytes for plan in plans.values())
    assert plans["quality"].fidelity_error <= plans["balanced"].fidelity_error <= plans["speed"].fidelity_error
    for prefer in PREFERENCES:
        rating = Objective(prefer, spec(name), machine(profile, 32)).rating
        assert all(rating(plans[prefer].stages) <= rating(other.stages) for other in plans.values())


def test_memory_gives_nothing_up_where_the_run_needs_more_anyway() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 32, px=768, selection=Selection(prefer="memory"))
    assert plan.stage("decode").tile_px == 0
    assert plan.stage("denoise").count(Placement.GPU) == 0


def test_tiles_come_when_the_whole_picture_does_not_fit() -> None:
    assert plan_for(KLEIN_4B, "rtx-2060-6gb", 64, px=2048).stage("decode").tile_px > 0
    assert plan_for(KLEIN_4B, "h100-80gb", 64, px=2048).stage("decode").tile_px == 0


# ------------------------------------------------------------------------------------------------ monotonicity

MACHINES = st.sampled_from(
    ["rtx-2060-6gb", "rtx-3060-12gb", "rtx-4060-8gb", "rtx-4060-ti-16gb", "rtx-4090-24gb", "l4-24gb", "cpu"]
)
GROWS = (
    "vram",
    "ram",
    "pinnable_bytes",
    "pin_bytes_per_s",
    "h2d_pinned_bytes_per_s",
    "h2d_pageable_bytes_per_s",
    "disk_read_bytes_per_s",
    "memory_bytes_per_s",
    "matmul_flops_per_s",
    "attention_flops_per_s",
)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([*MODELS, KLEIN_BASE]),
    MACHINES,
    st.sampled_from([512, 1024, 1536]),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.sampled_from([None, 1, 12]), st.sampled_from([0, 0, 1, 4])),
    st.integers(30, 240),
    st.integers(10, 640),
    st.sampled_from(GROWS),
    st.floats(1.001, 3),
    st.sampled_from(PREFERENCES),
)
def test_a_better_machine_never_gives_a_worse_plan(
    name: str,
    profile: str,
    px: int,
    counts: tuple[int, int, int | None, int],
    vram_tenths_gib: int,
    ram_tenths_gib: int,
    what: str,
    factor: float,
    prefer: Preference,
) -> None:
    """More memory or bandwidth, by any amount: the plan's own objective never rates it worse, exactly.

    ``counts``: images, prompts, steps, reference images.
    """
    model, workload = spec(name), work(name, px, *counts)

    def rated(grown: float) -> tuple[float, ...]:
        vram, ram = (tenths * GIB // 10 for tenths in (vram_tenths_gib, ram_tenths_gib))
        hardware = replace(machine(profile), vram_bytes=200 * GIB if profile != "cpu" else 0)
        if what == "ram":
            ram = int(grown * ram)
        hardware = with_ram_for(hardware, ram)
        if what == "vram":
            vram = int(grown * vram)
        elif what == "matmul_flops_per_s":
            rates = {kind: grown * rate for kind, rate in hardware.matmul_flops_per_s.items()}
            hardware = replace(hardware, matmul_flops_per_s=rates)
        elif what != "ram":
            value = getattr(hardware, what)
            hardware = replace(hardware, **{what: type(value)(grown * value)})
        # A copy from pageable memory goes through pinned memory: no machine has it faster.
        pageable = min(hardware.h2d_pageable_bytes_per_s, hardware.h2d_pinned_bytes_per_s)
        hardware = replace(hardware, h2d_pageable_bytes_per_s=pageable)
        selection = Selection(prefer=prefer, max_vram_bytes=vram, max_ram_bytes=ram)
        plan = make_plan(model, workload, hardware, selection, profile=profile, support=EVERYTHING)
        return Objective(prefer, model, hardware).rating(plan.stages)

    try:
        before = rated(1)
    except DoesNotFit:
        return
    assert rated(factor) <= before


# ------------------------------------------------------------------------------------------------- executable


def test_not_executable_is_filled_exactly_where_support_lacks_something() -> None:
    for profile in SMALL_AND_LARGE:
        plan = plan_for(KLEIN_9B, profile, 32, support=EVERYTHING)
        lacks = {word for stage in plan.stages for word in SUPPORTED.missing(stage)}
        assert plan.not_executable == ()  # nothing is beyond EVERYTHING
        ours = plan_for(KLEIN_9B, profile, 32)
        assert ours.not_executable == ()
        assert not any(SUPPORTED.missing(stage) for stage in ours.stages), lacks


def test_only_the_stage_that_does_not_fit_falls_back_to_a_later_version() -> None:
    selection = Selection(max_vram_bytes=2900 * MIB)
    plan = plan_for(DEV, "rtx-2060-6gb", selection=selection, support=UNQUANTIZED)
    assert plan.not_executable
    assert UNQUANTIZED.missing(plan.stage("denoise"))
    assert not UNQUANTIZED.missing(plan.stage("encode"))
    assert set(plan.not_executable) == set(UNQUANTIZED.missing(plan.stage("denoise")))
    assert plan_for(DEV, "rtx-2060-6gb", selection=selection).not_executable == ()


def test_a_model_with_a_single_block_is_planned_on_any_machine() -> None:
    model = spec(KLEIN_4B)
    tiny = replace(model, transformer=replace(model.transformer, num_double=1, num_single=0))
    for profile in SMALL_AND_LARGE:
        plan = plan_supported(tiny, work(KLEIN_4B, 512), machine(profile), Selection(prefer="memory"), profile=profile)
        assert len(plan.stage("denoise").block_placements) == 1


# ------------------------------------------------------------------------------------------------ from the reviews


def test_ram_that_only_loading_without_an_arena_would_need_is_filled() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 32, selection=Selection(weight_format="bf16"))
    denoise = plan.stage("denoise")
    left = [
        size
        for size, at in zip(block_sizes(denoise, spec(DEV)), denoise.block_placements, strict=True)
        if at is Placement.DISK
    ]
    assert left
    assert denoise.cost.peak_ram_bytes + min(left) > plan.limits.ram_bytes
    arena = denoise.cost.host_pinned_bytes + denoise.cost.host_pageable_bytes
    assert arena + denoise.cost.process_bytes + min(left) > plan.limits.ram_bytes - 64 * MIB


def test_the_largest_shortfall_is_reported_whichever_stage_it_is_in() -> None:
    selection = Selection(max_vram_bytes=650 * MIB, vae_tile="off")
    with pytest.raises(DoesNotFit) as caught:
        plan_for(KLEIN_4B, "rtx-3060-12gb", px=2048, selection=selection)
    hardware, error = machine("rtx-3060-12gb"), caught.value
    limits = limits_of(hardware, selection)
    job = Job(spec(KLEIN_4B), work(KLEIN_4B, 2048), hardware, selection, limits, EVERYTHING)
    least = {stage: min(need.vram for need in job.least(stage)) for stage in STAGES}
    assert error.stage == max(STAGES, key=lambda stage: least[stage]) == "decode"
    assert least["encode"] > limits.vram_bytes
    assert error.needed_bytes == least["decode"]
