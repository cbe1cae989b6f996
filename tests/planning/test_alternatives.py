"""The front holds nothing that another run beats; each neighbour says truly why it was not taken."""

from __future__ import annotations

import json

import pytest
from machines import DEV, KLEIN_4B, MODELS, machine, plan_for, spec, work

from lowmem_flux2.planning.alternatives import (
    FRONT_STEPS,
    SAME_TIME,
    Alternatives,
    FrontPoint,
    Rejected,
    alternatives_of,
)
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.support import EVERYTHING

CASES = [(DEV, "rtx-4090-24gb", 64), (DEV, "rtx-3060-12gb", 16), (KLEIN_4B, "rtx-2060-6gb", 16), (KLEIN_4B, "cpu", 24)]


def alternatives(name: str, profile: str, ram_gib: int, px: int = 1024) -> tuple[Plan, Alternatives]:
    plan = plan_for(name, profile, ram_gib, px=px, support=EVERYTHING)
    return plan, alternatives_of(plan, spec(name), Selection(), EVERYTHING)


def triple(point: FrontPoint) -> tuple[float, ...]:
    return point.peak_vram_bytes or point.peak_ram_bytes, point.time_s, point.fidelity_error


@pytest.mark.parametrize(("name", "profile", "ram_gib"), CASES)
def test_no_point_of_the_front_beats_another(name: str, profile: str, ram_gib: int) -> None:
    plan, found = alternatives(name, profile, ram_gib)
    assert found.front
    for point in found.front:
        assert point.peak_vram_bytes <= plan.limits.vram_bytes
        assert point.peak_ram_bytes <= plan.limits.ram_bytes
        assert not any(
            other != point and all(a <= b for a, b in zip(triple(other), triple(point), strict=True))
            for other in found.front
        )


@pytest.mark.parametrize(("name", "profile", "ram_gib"), CASES)
def test_the_front_reaches_from_the_fastest_to_the_most_faithful_run(name: str, profile: str, ram_gib: int) -> None:
    _, found = alternatives(name, profile, ram_gib)
    fastest, quality = (
        plan_for(name, profile, ram_gib, selection=Selection(prefer=prefer), support=EVERYTHING)
        for prefer in ("speed", "quality")
    )
    assert min(point.time_s for point in found.front) == pytest.approx(fastest.time_s, rel=SAME_TIME)
    assert min(point.fidelity_error for point in found.front) == quality.fidelity_error
    assert (
        min(point.time_s for point in found.front if point.fidelity_error == quality.fidelity_error) <= quality.time_s
    )


def test_a_run_with_less_memory_is_on_the_front_or_beaten_by_it() -> None:
    plan, found = alternatives(DEV, "rtx-4090-24gb", 64)
    step = plan.limits.vram_bytes / FRONT_STEPS
    for parts in range(2, FRONT_STEPS + 1):
        cap = int(parts * step)
        selection = Selection(prefer="speed", max_vram_bytes=cap)
        capped = plan_for(DEV, "rtx-4090-24gb", 64, selection=selection, support=EVERYTHING)
        near = [point.time_s for point in found.front if point.peak_vram_bytes <= cap + step]
        assert min(near) <= (1 + SAME_TIME) * capped.time_s


@pytest.mark.parametrize(("name", "profile", "ram_gib"), CASES)
def test_every_neighbour_says_why(name: str, profile: str, ram_gib: int) -> None:
    plan, found = alternatives(name, profile, ram_gib)
    assert {neighbour.stage for neighbour in found.rejected} >= {"denoise", "decode"}
    for neighbour in found.rejected:
        mine = plan.stage(neighbour.stage).cost
        assert neighbour.fits == (not neighbour.why.startswith("needs "))
        over = neighbour.peak_vram_bytes > plan.limits.vram_bytes or neighbour.peak_ram_bytes > plan.limits.ram_bytes
        assert over <= (not neighbour.fits)
        if neighbour.why.startswith("slower"):
            assert neighbour.time_s > mine.time_s
        if neighbour.why.startswith("error"):
            assert neighbour.fidelity_error > mine.fidelity_error
        if neighbour.why.startswith("as fast"):
            assert neighbour.time_s == pytest.approx(mine.time_s, rel=0.01)


def changes(found: Alternatives) -> dict[tuple[str, str], Rejected]:
    return {(neighbour.stage, neighbour.change): neighbour for neighbour in found.rejected}


def test_the_neighbours_are_formats_tiers_slots_and_tiles() -> None:
    _, found = alternatives(DEV, "rtx-4090-24gb", 24)
    denoise = {change for stage, change in changes(found) if stage == "denoise"}
    assert {"bf16 weights", "int6 weights", "one more block resident", "one block fewer resident", "1 slot"} <= denoise
    assert not changes(found)["denoise", "one more block resident"].fits
    assert changes(found)["denoise", "bf16 weights"].why.startswith("slower")
    assert any(change.startswith("tiles of") for stage, change in changes(found) if stage == "decode")


def test_untiled_is_a_neighbour_of_tiles() -> None:
    _, found = alternatives(KLEIN_4B, "rtx-2060-6gb", 64, px=2048)
    assert changes(found)["decode", "untiled"].why.startswith("needs 10")


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_with_its_alternatives_beside_it_is_read_back(name: str) -> None:
    selection = Selection(prefer="speed")
    hardware = machine("rtx-3060-12gb", 32)
    plan = make_plan(spec(name), work(name), hardware, selection, profile="rtx-3060-12gb", support=EVERYTHING)
    written = plan.to_json() | alternatives_of(plan, spec(name), selection, EVERYTHING).to_json()
    assert {"pareto", "rejected"} <= written.keys()
    assert Plan.from_json(json.loads(json.dumps(written)), "plan.json") == plan
