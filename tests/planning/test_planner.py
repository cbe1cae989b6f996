"""Plans keep to their limits, are the best by their own objective, and honour or refuse every flag."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

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
    SUPPORTED,
    UNQUANTIZED,
    machine,
    plan_for,
    spec,
    work,
)

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.formats import PLAIN_FORMATS
from lowmem_flux2.planning.hardware import list_profiles
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import Objective, effort_of, time_then_effort_of
from lowmem_flux2.planning.plan import STAGES, Limits, Placement, Plan, StagePlan
from lowmem_flux2.planning.planner import limits_of
from lowmem_flux2.planning.planner import make_plan as plan_with_support
from lowmem_flux2.planning.selection import Selection, with_ram_for
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import GIB, MIB

PREFERENCES: tuple[Preference, ...] = get_args(Preference)
make_plan = partial(plan_with_support, support=SUPPORTED)
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
                plan = make_plan(spec(name), work(name, px), hardware, selection, profile=profile)
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
    stage = make_plan(
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
    plan = plan_with_support(model, workload, hardware, selection, profile=profile, support=support)
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
    plan = plan_for(DEV, "rtx-3060-12gb", 32, selection=Selection(prefer="memory"))
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
        plan = plan_with_support(model, workload, hardware, selection, profile=profile, support=EVERYTHING)
        return Objective(prefer, model, hardware).rating(plan.stages)

    try:
        before = rated(1)
    except DoesNotFit:
        return
    assert rated(factor) <= before


# ------------------------------------------------------------------------------------------------ forced flags


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_an_unquantized_weight_format_is_honoured_with_its_compute_dtype(name: str) -> None:
    for selection in (Selection(weight_format=name), Selection(text_weight_format=name), Selection(dtype=name)):
        plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=selection)
        assert {stage.compute_dtype for stage in plan.stages} == {name}
        asked = {"encode": selection.text_weight_format, "denoise": selection.weight_format, "decode": name}
        assert all(stage.weight_format == name for stage in plan.stages if asked[stage.stage] == name)
        assert {stage.weight_format for stage in plan.stages} & set(PLAIN_FORMATS) == {name}
        assert plan.not_executable == ()
        plain = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=selection, support=UNQUANTIZED)
        assert {stage.weight_format for stage in plain.stages} == {name}


@pytest.mark.parametrize("name", ["int8", "w8a8", "int6", "fp8", "nf4", "int4"])
def test_a_quantized_weight_format_is_honoured_and_runs_with_its_library(name: str) -> None:
    for selection, stage in (
        (Selection(weight_format=name), "denoise"),
        (Selection(text_weight_format=name), "encode"),
    ):
        plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=selection)
        assert plan.stage(stage).weight_format == name
        assert plan.not_executable == ()


@pytest.mark.parametrize("name", ["int8", "fp8", "nf4", "int4"])
def test_a_quantized_weight_format_is_honoured_and_named_where_it_cannot_run(name: str) -> None:
    remedy = " (needs bitsandbytes, which is not installed: pip install 'lowmem-flux2[cuda]')" if name == "nf4" else ""
    selection = Selection(weight_format=name)
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=selection, support=UNQUANTIZED)
    assert plan.stage("denoise").weight_format == name
    assert plan.stage("encode").weight_format == "bf16"
    assert f"transformer weights in {name}{remedy}" in plan.not_executable
    selection = Selection(text_weight_format=name)
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=selection, support=UNQUANTIZED)
    assert plan.stage("encode").weight_format == name
    assert plan.not_executable == (f"text_encoder weights in {name}{remedy}",)


def test_int8_compute_is_taken_for_speed_alone_and_where_it_is_faster() -> None:
    for prefer in PREFERENCES:
        plan = plan_for(DEV, "rtx-4090-24gb", 64, selection=Selection(prefer=prefer))
        assert (plan.stage("denoise").weight_format == "w8a8") == (prefer == "speed")
        assert plan.stage("encode").weight_format != "w8a8"
    fast = Selection(prefer="speed")
    assert plan_for(DEV, "h100-80gb", 64, selection=fast).stage("denoise").weight_format != "w8a8"
    asked = plan_for(DEV, "rtx-4090-24gb", 64, selection=Selection(weight_format="w8a8"))
    stored = plan_for(DEV, "rtx-4090-24gb", 64, selection=Selection(weight_format="int8"))
    assert asked.stage("denoise").cost.compute_s < 0.6 * stored.stage("denoise").cost.compute_s
    assert {made.weight_format for made in asked.preparations if made.component == "transformer"} == {"int8"}


def test_a_format_is_planned_only_where_its_library_is() -> None:
    without = replace(SUPPORTED, weight_formats=SUPPORTED.weight_formats - {"nf4"})
    for prefer in PREFERENCES:
        plan = plan_for(DEV, "h100-80gb", 32, selection=Selection(prefer=prefer), support=without)
        assert all(stage.weight_format != "nf4" for stage in plan.stages)
        assert plan.not_executable == ()


@pytest.mark.parametrize("placement", ["pinned", "pageable", "disk"])
def test_a_placement_is_honoured_for_all_that_is_not_resident(placement: Any) -> None:
    plan = plan_for(KLEIN_9B, "rtx-3060-12gb", 96, selection=Selection(placement=placement))
    for stage in plan.stages[:2]:
        assert set(stage.block_placements) <= {Placement.GPU, Placement(placement)}
    assert plan.stage("denoise").count(Placement(placement)) > 0


def test_all_resident_is_honoured_or_does_not_fit() -> None:
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", selection=Selection(placement="resident"))
    assert all(set(stage.block_placements) <= {Placement.GPU} for stage in plan.stages)
    with pytest.raises(DoesNotFit) as caught:
        plan_for(DEV, "rtx-3060-12gb", 64, selection=Selection(placement="resident", weight_format="bf16"))
    assert (caught.value.stage, caught.value.resource) == ("denoise", "vram")
    assert caught.value.needed_bytes > 60 * GIB


def test_pinning_more_than_may_be_pinned_does_not_fit() -> None:
    hardware = replace(machine("rtx-3060-12gb", 128), pinnable_bytes=8 * GIB)
    with pytest.raises(DoesNotFit) as caught:
        make_plan(spec(DEV), work(DEV), hardware, Selection(placement="pinned", weight_format="bf16"), profile="x")
    assert caught.value.resource == "pinnable ram"
    assert caught.value.needed_bytes > caught.value.available_bytes == 8 * GIB


@pytest.mark.parametrize(("asked", "planned"), [("off", 0), ("512", 512), ("64", 64), ("1024", 0), ("4096", 0)])
def test_a_tile_is_honoured(asked: str, planned: int) -> None:
    plan = plan_for(KLEIN_4B, "rtx-3060-12gb", selection=Selection(vae_tile=asked))
    assert plan.stage("decode").tile_px == planned  # a tile as large as the picture is no tiling


def test_untiled_is_honoured_or_does_not_fit() -> None:
    with pytest.raises(DoesNotFit, match="decode"):
        plan_for(KLEIN_4B, "rtx-2060-6gb", px=2048, selection=Selection(vae_tile="off"))


@pytest.mark.parametrize(("asked", "planned"), [(1, 1), (2, 2), (3, 3), (5, 5), (8, 5)])
def test_a_batch_size_is_honoured_up_to_the_images_there_are(asked: int, planned: int) -> None:
    plan = plan_for(KLEIN_4B, "h100-80gb", images=5, selection=Selection(batch_size=asked))
    assert plan.stage("denoise").batch_size == planned


@pytest.mark.parametrize(("profile", "ram_gib"), [("rtx-3060-12gb", 24), ("rtx-4090-24gb", 64), ("rtx-2060-6gb", 16)])
@pytest.mark.parametrize("name", [KLEIN_4B, DEV])
def test_the_batch_size_is_that_of_the_best_predicted_throughput(name: str, profile: str, ram_gib: int) -> None:
    """Of those that fit: no other one denoises the same images in less time."""

    def denoise_s(batch_size: int) -> float:
        selection = Selection(prefer="speed", batch_size=batch_size)
        try:
            made = plan_for(name, profile, ram_gib, px=512, prompts=6, selection=selection)
        except DoesNotFit:
            return float("inf")
        assert batch_size == 0 or made.stage("denoise").batch_size == batch_size
        return made.stage("denoise").cost.time_s

    best = denoise_s(0)
    assert best < float("inf")
    for batch_size in (1, 2, 3, 6):
        assert best <= denoise_s(batch_size) + 1e-5  # whole microseconds decide


@pytest.mark.parametrize("cap_gib", [3, 4, 6, 9])
def test_a_vram_cap_is_kept(cap_gib: int) -> None:
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", selection=Selection(max_vram_bytes=cap_gib * GIB))
    assert plan.limits.vram_bytes == cap_gib * GIB
    assert plan.peak_vram_bytes <= cap_gib * GIB


def test_a_cap_above_the_card_is_the_card() -> None:
    hardware = machine("rtx-3060-12gb")
    limits = limits_of(hardware, Selection(max_vram_bytes=80 * GIB))
    assert limits.vram_bytes == hardware.vram_bytes - hardware.vram_reserve_bytes + hardware.context_bytes


@pytest.mark.parametrize("cap_mib", [2048, 3000, 12 * 1024, 64 * 1024])
def test_a_ram_cap_is_kept_and_is_exact(cap_mib: int) -> None:
    hardware = with_ram_for(machine("rtx-3060-12gb"), cap_mib * MIB)
    selection = Selection(max_ram_bytes=cap_mib * MIB)
    limits = limits_of(hardware, selection)
    assert limits.ram_bytes == cap_mib * MIB
    assert limits_of(hardware, Selection()).ram_bytes >= cap_mib * MIB
    try:
        plan = make_plan(spec(DEV), work(DEV), hardware, selection, profile="x")
    except DoesNotFit as error:
        assert (error.resource, error.available_bytes) == ("ram", cap_mib * MIB)
    else:
        assert plan.peak_ram_bytes <= cap_mib * MIB


def test_the_system_keeps_a_tenth_of_ram_or_a_gib() -> None:
    hardware = machine("rtx-3060-12gb")
    assert limits_of(replace(hardware, ram_bytes=64 * GIB), Selection()).ram_bytes == 64 * GIB - 64 * GIB // 10
    assert limits_of(replace(hardware, ram_bytes=4 * GIB), Selection()).ram_bytes == 3 * GIB
    assert limits_of(replace(hardware, ram_bytes=GIB // 2), Selection()).ram_bytes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefer": "cheap"}, "--prefer cheap: unknown; one of quality"),
        ({"weight_format": "int3"}, "--weight-format int3: unknown; one of auto, fp32"),
        ({"text_weight_format": "q8"}, "--text-weight-format q8: unknown"),
        ({"dtype": "int8"}, "--dtype int8: unknown; one of auto, bf16"),
        ({"placement": "tape"}, "--placement tape: unknown; one of auto"),
        ({"step_cache": "teacache"}, "--step-cache teacache"),
        ({"vae_tile": "500"}, "--vae-tile 500: auto, off, or a multiple of 64"),
        ({"vae_tile": "0"}, "--vae-tile 0"),
        ({"vae_tile": "-64"}, "--vae-tile -64"),
        ({"vae_tile": "8192"}, "--vae-tile 8192"),
        ({"vae_tile": "٦٤"}, "--vae-tile"),
        ({"batch_size": -1}, "--batch-size -1"),
        ({"weight_format": "fp32", "dtype": "bf16"}, "--weight-format fp32 with compute dtype bf16: .* --dtype fp32"),
        ({"weight_format": "bf16", "text_weight_format": "fp32"}, "--text-weight-format fp32 with compute dtype bf16"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_for(KLEIN_4B, "rtx-3060-12gb", selection=Selection(**options))


@pytest.mark.parametrize("options", [{"weight_format": "bf16"}, {"text_weight_format": "bf16"}, {"dtype": "bf16"}])
def test_turing_refuses_bf16(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no bf16 units \(compute capability 7.5\)"):
        plan_for(KLEIN_4B, "rtx-2060-6gb", selection=Selection(**options))


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_turing_never_gets_bf16(prefer: Preference) -> None:
    for support in (SUPPORTED, EVERYTHING):
        for name in MODELS:
            plan = plan_for(name, "rtx-2080-ti-11gb", 32, selection=Selection(prefer=prefer), support=support)
            assert all("bf16" not in (stage.weight_format, stage.compute_dtype) for stage in plan.stages)


def test_a_cpu_without_bf16_units_computes_in_fp32() -> None:
    hardware = machine("cpu", 64)
    rates = {kind: rate for kind, rate in hardware.matmul_flops_per_s.items() if kind != "bf16"}
    plan = make_plan(
        spec(KLEIN_4B), work(KLEIN_4B), replace(hardware, matmul_flops_per_s=rates), Selection(), profile="cpu"
    )
    assert {stage.compute_dtype for stage in plan.stages} == {"fp32"}


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
        plan = make_plan(tiny, work(KLEIN_4B, 512), machine(profile), Selection(prefer="memory"), profile=profile)
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
