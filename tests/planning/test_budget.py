"""Budgets: RAM decides what is resident on a CPU, nothing is pinned beyond its limit, and overruns are told."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, MODELS, SUPPORTED, machine, plan_for, spec, work

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning import detect
from lowmem_flux2.planning.budget import overrun
from lowmem_flux2.planning.hardware import LIBRARIES_HOST_BYTES, load_profile
from lowmem_flux2.planning.nvml import NvmlCard
from lowmem_flux2.planning.plan import Limits, Placement
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.selection import Selection, limits_of, with_ram_for
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.units import GIB, MIB

# ------------------------------------------------------------------------------------------------------ --max-ram


@pytest.mark.parametrize("name", [KLEIN_4B, DEV])
def test_on_a_cpu_ram_decides_between_resident_and_disk(name: str) -> None:
    selection = Selection(weight_format="bf16", text_weight_format="bf16", batch_size=1)
    resident = []
    caps = [3, 4, 6, 8, 10, 12, 16, 24, 48, 96]
    for cap in caps:
        chosen = replace(selection, max_ram_bytes=cap * GIB)
        try:
            plan = make_plan(spec(name), work(name, steps=50), machine("cpu", 192), chosen, profile="cpu")
        except DoesNotFit:
            assert not resident
            continue
        denoise = plan.stage("denoise")
        assert plan.peak_ram_bytes <= cap * GIB
        assert denoise.count(Placement.GPU) + denoise.count(Placement.DISK) == len(denoise.block_placements)
        resident.append(denoise.count(Placement.GPU))
        # By degrees: what is left would not take the largest block, unless all are there.
        left = cap * GIB - plan.peak_ram_bytes
        assert resident[-1] == len(denoise.block_placements) or left < max(block_sizes(denoise, spec(name))), cap
    assert resident == sorted(resident)
    assert resident[0] < resident[-1] == len(denoise.block_placements)


@given(st.integers(1, 256 * GIB))
def test_the_systems_share_is_added_as_it_is_taken(ram_bytes: int) -> None:
    hardware = with_ram_for(machine("cpu", 64), ram_bytes)
    assert limits_of(hardware, Selection()).ram_bytes in (ram_bytes, ram_bytes + 1)


# --------------------------------------------------------------------------------------------------------- pinning


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(MODELS),
    profile=st.sampled_from(["rtx-2060-6gb", "rtx-3060-12gb", "rtx-4090-24gb"]),
    ram_gib=st.integers(4, 128),
    pinnable_bytes=st.one_of(st.just(0), st.integers(0, 64 * GIB)),
    max_ram_gib=st.one_of(st.none(), st.integers(4, 64)),
    prefer=st.sampled_from(["balanced", "quality", "speed", "memory"]),
)
def test_no_plan_pins_more_than_may_be_pinned(
    name: str, profile: str, ram_gib: int, pinnable_bytes: int, max_ram_gib: int | None, prefer: str
) -> None:
    hardware = replace(machine(profile), ram_bytes=ram_gib * GIB, pinnable_bytes=pinnable_bytes)
    cap = None if max_ram_gib is None else max_ram_gib * GIB
    selection = Selection(prefer=prefer, max_ram_bytes=cap)  # type: ignore[arg-type]
    try:
        plan = make_plan(spec(name), work(name, 512), hardware, selection, profile=profile, support=SUPPORTED)
    except DoesNotFit:
        return
    for stage in plan.stages:
        assert stage.cost.host_pinned_bytes <= plan.limits.pinnable_bytes <= pinnable_bytes
        assert stage.cost.peak_ram_bytes <= plan.limits.ram_bytes <= ram_gib * GIB
    if cap is not None:
        assert plan.peak_ram_bytes <= cap


def test_where_nothing_may_be_pinned_disk_blocks_still_run_through_plain_memory() -> None:
    hardware = replace(machine("rtx-3060-12gb"), pinnable_bytes=0)
    plan = make_plan(
        spec(DEV), work(DEV), hardware, Selection(placement="disk"), profile="rtx-3060-12gb", support=SUPPORTED
    )
    denoise = plan.stage("denoise")
    pinned = plan_for(DEV, "rtx-3060-12gb", selection=Selection(placement="disk")).stage("denoise")
    assert denoise.count(Placement.DISK) > 0
    assert denoise.cost.host_pinned_bytes == 0
    assert replace(denoise, cost=pinned.cost, reasons=()) == replace(pinned, reasons=())
    assert denoise.cost.peak_ram_bytes == pinned.cost.peak_ram_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")
def test_with_memlock_0_nothing_is_pinnable_and_no_plan_pins() -> None:
    resource = importlib.import_module("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = detect.read_host()
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, before[1]))
        host = detect.read_host()
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, before)
    assert (host.ram_bytes, host.pinnable_bytes) == (free.ram_bytes, 0)
    card = NvmlCard("NVIDIA GeForce RTX 3060", "GPU-0", 12 * GIB, 12 * GIB, (8, 6), 4, 16, 3584)
    hardware = detect.detect("cuda", cards=(card,), host=replace(host, ram_bytes=128 * GIB), calibrated=False)
    assert hardware.pinnable_bytes == 0
    plan = make_plan(spec(DEV), work(DEV), hardware, Selection(), profile="auto", support=SUPPORTED)
    assert plan.limits.pinnable_bytes == 0
    assert all(stage.count(Placement.PINNED) == stage.cost.host_pinned_bytes == 0 for stage in plan.stages)
    with pytest.raises(DoesNotFit, match="PINNABLE RAM") as caught:
        make_plan(spec(DEV), work(DEV), hardware, Selection(placement="pinned"), profile="auto", support=SUPPORTED)
    assert caught.value.available_bytes == 0


# -------------------------------------------------------------------------------------------------------- overruns


LIMITS = Limits(vram_bytes=0, ram_bytes=4 * GIB, pinnable_bytes=0)
STAGE = plan_for(KLEIN_4B, "cpu", 64, px=256).stage("denoise")
PREDICTED = replace(STAGE, cost=replace(STAGE.cost, host_bytes=GIB, host_pinned_bytes=0, margin_bytes=100 * MIB))


@pytest.mark.parametrize(
    ("measured", "before", "said"),
    [
        (GIB, 0, None),
        (GIB + 100 * MIB, 0, None),
        (GIB + 101 * MIB, 0, "peak RAM was 1.10 GiB: predicted were 1.00 GiB and a margin of 100 MiB"),
        (GIB + 101 * MIB, LIBRARIES_HOST_BYTES + MIB, None),
        (3 * GIB, LIBRARIES_HOST_BYTES + 2 * GIB, None),
        (4 * GIB, LIBRARIES_HOST_BYTES + 2 * GIB, "2.00 GiB of which were held before the run"),
        (5 * GIB, 5 * GIB, "1.00 GiB over the budget of 4.00 GiB (predicted 1.00 GiB)"),
    ],
)
def test_an_overrun_is_told_with_its_numbers(measured: int, before: int, said: str | None) -> None:
    told = overrun(PREDICTED, load_profile("cpu"), LIMITS, measured, before)
    assert (told is None) == (said is None)
    assert told is None or (said is not None and said in told and told.startswith("denoise: "))
