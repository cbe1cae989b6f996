"""Flags that fix a choice are honoured, or refused with what is short: the planner never passes one by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from machines import (
    DEV,
    KLEIN_4B,
    KLEIN_9B,
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

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.formats import PLAIN_FORMATS
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.planning.planner import limits_of
from lowmem_flux2.planning.selection import Selection, with_ram_for
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import GIB, MIB


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


@pytest.mark.parametrize("name", ["int8", "w8a8", "int6", "fp8", "nf4", "nf4-mixed", "int4"])
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
        plan_supported(spec(DEV), work(DEV), hardware, Selection(placement="pinned", weight_format="bf16"), profile="x")
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
        plan = plan_supported(spec(DEV), work(DEV), hardware, selection, profile="x")
    except DoesNotFit as error:
        assert (error.resource, error.available_bytes) == ("ram", cap_mib * MIB)
    else:
        assert plan.peak_ram_bytes <= cap_mib * MIB


def test_the_system_keeps_a_tenth_of_ram_or_a_gib_and_never_more_than_a_third() -> None:
    """A small container's limit is on what runs in it, and not on the system."""
    hardware = machine("rtx-3060-12gb")
    assert limits_of(replace(hardware, ram_bytes=64 * GIB), Selection()).ram_bytes == 64 * GIB - 64 * GIB // 10
    assert limits_of(replace(hardware, ram_bytes=4 * GIB), Selection()).ram_bytes == 3 * GIB
    assert limits_of(replace(hardware, ram_bytes=1200 * MIB), Selection()).ram_bytes == 800 * MIB


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
    plan = plan_supported(
        spec(KLEIN_4B), work(KLEIN_4B), replace(hardware, matmul_flops_per_s=rates), Selection(), profile="cpu"
    )
    assert {stage.compute_dtype for stage in plan.stages} == {"fp32"}
