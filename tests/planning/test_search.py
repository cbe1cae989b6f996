"""Branch and bound finds what trying everything finds, to the nanosecond, and its bounds hold."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
from everything import everything
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, machine, plan_for, spec, work

from lowmem_flux2.planning.candidates import Job, fits
from lowmem_flux2.planning.cost import device_bytes, device_room_bytes, device_total_bytes
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.objective import effort, effort_of, time_then_effort, time_then_effort_of
from lowmem_flux2.planning.plan import Limits, Placement, StagePlan
from lowmem_flux2.planning.residency import residency_order, spread_order
from lowmem_flux2.planning.search import SLOT_COUNTS, Search
from lowmem_flux2.planning.selection import Selection, StreamFrom, limits_of
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.units import GIB, MIB


@cache
def short(double: int, single: int) -> ModelSpec:
    """Klein-4b with fewer blocks, of which everything can be tried."""
    model = spec(KLEIN_4B)
    return replace(model, transformer=replace(model.transformer, num_double=double, num_single=single))


GIGA = st.sampled_from([1e9, 2.5e9, 4e9, 8e9, 16e9, 50e9])


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    hardware = machine(draw(st.sampled_from(["rtx-3060-12gb", "rtx-3060-12gb", "cpu"])))
    pinned, pageable = sorted([draw(GIGA), draw(GIGA)], reverse=True)
    hardware = replace(
        hardware,
        h2d_pinned_bytes_per_s=pinned,
        h2d_pageable_bytes_per_s=pageable,
        disk_read_bytes_per_s=draw(GIGA),
        pin_bytes_per_s=draw(GIGA),
        memory_bytes_per_s=draw(GIGA) * 10,
        matmul_flops_per_s={kind: draw(GIGA) * 5e3 for kind in hardware.matmul_flops_per_s},
    )
    ram = draw(st.integers(1000, 5000)) * MIB
    limits = Limits(
        vram_bytes=draw(st.integers(1200, 5000)) * MIB,
        ram_bytes=ram,
        pinnable_bytes=draw(st.integers(0, 3000)) * MIB if hardware.device == "cuda" else ram,
    )
    model = short(draw(st.integers(0, 2)), draw(st.integers(1, 4)))
    workload = work(
        KLEIN_4B, draw(st.sampled_from([256, 1024])), draw(st.integers(1, 2)), steps=draw(st.integers(1, 6))
    )
    selection = Selection(
        placement=draw(st.sampled_from(["auto"] * 4 + list(get_args(StreamFrom)))),
        weight_format=draw(st.sampled_from(["bf16", "int8", "auto"])),
    )
    return Job(model, workload, hardware, selection, limits, EVERYTHING)


@settings(deadline=None, max_examples=30)
@given(jobs(), st.booleans())
def test_it_finds_the_best_of_all(job: Job, by_time: bool) -> None:
    value, value_of = (time_then_effort, time_then_effort_of) if by_time else (effort, effort_of)
    found = Search(job.families("denoise"), job.selection.placement, job.limits, value)
    stage = found.run()
    fitting = [candidate for candidate in everything(job) if fits(candidate, job.limits)]
    if stage is None:
        assert fitting == []
        return
    chosen = job.priced(stage)
    assert fits(chosen, job.limits)
    assert value_of(chosen) == found.bound == min(map(value_of, fitting))


@settings(deadline=None, max_examples=60)
@given(jobs(), st.integers(0, 6 * 2**30))
def test_what_fits_the_device_is_what_the_sum_of_its_parts_says(job: Job, most_bytes: int) -> None:
    for family in job.families("denoise")[:4]:
        work = family[0].work
        room = device_room_bytes(work, most_bytes)
        for held in (0, 1, 10**9, max(room - 1, 0), max(room, 0), max(room + 1, 0), max(room + 2, 0)):
            for gpu in (0, held // 3, held):
                total = sum(device_bytes(work, gpu, held - gpu))
                assert device_total_bytes(work, held) == total
                assert (total <= most_bytes) == (held <= room)


@settings(deadline=None, max_examples=60)
@given(jobs())
def test_what_is_needed_at_the_least_is_what_some_plan_needs(job: Job) -> None:
    plans = list(everything(job))
    needs = list(job.least("denoise"))
    assert min(need.vram for need in needs) == min(plan.cost.peak_vram_bytes for plan in plans)
    assert min(need.ram for need in needs) == min(plan.cost.peak_ram_bytes for plan in plans)
    assert any(need.fits(job.limits) for need in needs) == any(fits(plan, job.limits) for plan in plans)


def search(hardware: Hardware, name: str = DEV) -> Search:
    job = Job(spec(name), work(name), hardware, Selection(), limits_of(hardware, Selection()), EVERYTHING)
    return Search(job.families("denoise"), "auto", job.limits, effort)


@pytest.mark.parametrize("profile", ["rtx-4090-24gb", "rtx-4060-8gb", "h100-80gb", "cpu"])
def test_bounds_only_grow_up_to_the_value_of_what_is_found(profile: str) -> None:
    one, whole = search(machine(profile, 32)), search(machine(profile, 32))
    whole.run()
    bounds = []
    while one.found is None:
        assert one.bound is not None
        bounds.append(one.bound)
        one.advance(1)
    assert bounds == sorted(bounds)
    assert bounds[-1] <= whole.bound == one.bound
    assert one.found == whole.found


def test_nothing_is_found_where_nothing_fits() -> None:
    job = Job(spec(DEV), work(DEV), machine("rtx-3060-12gb"), Selection(), Limits(GIB, GIB, 0), EVERYTHING)
    found = Search(job.families("denoise"), "auto", job.limits, effort)
    assert found.run() is None
    assert found.bound is None


# ------------------------------------------------------------------------------------------------- residency order


@given(st.lists(st.sampled_from([10, 20, 20]), min_size=1, max_size=60))
def test_residency_visits_each_block_once_largest_first(sizes: list[int]) -> None:
    order = residency_order(tuple(sizes))
    assert sorted(order) == list(range(len(sizes)))
    assert [sizes[index] for index in order] == sorted(sizes, reverse=True)


@pytest.mark.parametrize("residents", [2, 4, 8, 16])
def test_residents_are_spread_over_the_step(residents: int) -> None:
    order = sorted(residency_order((1,) * 48)[:residents])
    gaps = [after - before for before, after in zip(order, [*order[1:], order[0] + 48], strict=True)]
    assert max(gaps) <= 2 * 48 / residents


def test_the_spread_order_spreads_blocks_of_all_sizes_over_the_step() -> None:
    sizes = tuple(block_sizes(StagePlan.bare("denoise", "int8", "bf16"), spec(DEV)))
    order = spread_order(sizes)
    assert sorted(order) == list(range(len(sizes)))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for count in (4, 8, 16, 32):
        at = sorted(starts[index] for index in order[:count])
        gaps = [after - before for before, after in zip(at, [*at[1:], at[0] + sum(sizes)], strict=True)]
        assert max(gaps) <= 2.7 * sum(sizes) / count


def test_where_the_disk_takes_part_spreading_wins_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer double-stream blocks resident, but the disk reads all through the step."""

    def planned() -> StagePlan:
        selection = Selection(prefer="quality")
        return plan_for(DEV, "rtx-4070-12gb", 32, selection=selection, support=EVERYTHING).stage("denoise")

    spread = planned()
    assert Placement.GPU in spread.block_placements[8:]  # of single-stream blocks, with double-stream ones streamed
    assert set(spread.block_placements[:8]) != {Placement.GPU}
    monkeypatch.setattr("lowmem_flux2.planning.search.SPREAD_SLOTS", ())
    assert planned().cost.run_s > 1.05 * spread.cost.run_s


def test_vram_never_shrinks_with_more_slots() -> None:
    """What the least needs of a stage rest on."""
    job = Job(spec(DEV), work(DEV, 256), machine("rtx-3060-12gb"), Selection(), Limits(0, 0, 0), EVERYTHING)
    for family in job.families("denoise"):
        for variant in family:
            blocks = variant.blocks
            for resident in range(blocks.total - 4):
                needs = [blocks.vram(resident, slots) for slots in sorted(SLOT_COUNTS)]
                assert needs == sorted(needs)
