"""The explanation shows the promise, every stage, its memory and its reasons."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import pytest
from machines import DEV, KLEIN_4B, KLEIN_BASE, UNQUANTIZED, plan_for
from rich.console import Console

from lowmem_flux2.planning.explain import BAR_WIDTH, explain
from lowmem_flux2.planning.plan import Limits, Plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.units import GIB
from lowmem_flux2.units import format_bytes, format_seconds


def shown(plan: Plan, width: int = 200) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(explain(plan))
    return console.export_text()


@pytest.mark.parametrize("profile", ["rtx-2060-6gb", "rtx-3060-12gb", "h100-80gb", "cpu"])
@pytest.mark.parametrize("name", [DEV, KLEIN_BASE])
def test_it_shows_the_promise_and_every_stage(name: str, profile: str) -> None:
    plan = plan_for(name, profile, 32)
    text = shown(plan, width=400)  # no reason is broken over two lines
    assert f"{name} on {profile}: 1 image of 1024x1024, {plan.workload.steps} steps" in text
    assert f"peak RAM {format_bytes(plan.peak_ram_bytes)} of {format_bytes(plan.limits.ram_bytes)}" in text
    assert ("peak VRAM" in text) == (profile != "cpu")
    assert f"about {format_seconds(plan.time_s)}" in text
    for stage in plan.stages:
        assert f"{stage.stage} ({stage.component})" in text
        assert all(reason in text for reason in stage.reasons)


def test_bars_add_up_to_the_peak_and_never_overflow() -> None:
    for profile in ("rtx-3060-12gb", "cpu"):
        plan = plan_for(DEV, profile, 32)
        bars = [line.split("|")[1] for line in shown(plan).splitlines() if line.count("|") == 2]
        assert [len(bar) for bar in bars] == [BAR_WIDTH] * 3
        limit = plan.limits.vram_bytes if profile != "cpu" else plan.limits.ram_bytes
        for bar, stage in zip(bars, plan.stages, strict=True):
            peak = stage.cost.peak_vram_bytes or stage.cost.peak_ram_bytes
            assert len(bar.strip()) == pytest.approx(BAR_WIDTH * peak / limit, abs=3)


def test_it_says_how_faithful_the_weights_are() -> None:
    assert "weights exact" in shown(plan_for(DEV, "rtx-3060-12gb"))
    quantized = plan_for(DEV, "rtx-3060-12gb", selection=Selection(weight_format="int8"))
    assert "weight error 0.008" in shown(quantized)


def test_it_says_what_this_version_cannot_run() -> None:
    text = shown(plan_for(DEV, "rtx-3060-12gb", selection=Selection(weight_format="int8"), support=UNQUANTIZED))
    assert "this version cannot run it yet: transformer weights in int8" in text


def test_counts_are_singular_where_there_is_one() -> None:
    plan = plan_for(KLEIN_BASE, "rtx-3060-12gb")
    one = replace(plan, workload=replace(plan.workload, steps=1))
    assert "1 image of 1024x1024, 1 step, two guidance passes" in shown(one)
    assert "3 images of" in shown(plan_for(KLEIN_4B, "rtx-3060-12gb", images=3))


def test_a_narrow_terminal_and_a_cap_of_nothing_do_not_break_it() -> None:
    plan = plan_for(KLEIN_4B, "rtx-3060-12gb")
    assert shown(plan, width=40)
    assert shown(replace(plan, limits=Limits(0, 0, 0)))


# ----------------------------------------------------------------------------------------------------- reasons


def reasons(plan: Plan, stage: str) -> str:
    return "; ".join(next(each.reasons for each in plan.stages if each.stage == stage))


def test_streaming_says_what_does_not_fit_and_whether_it_is_hidden() -> None:
    slow = reasons(plan_for(DEV, "rtx-3060-12gb", 96), "denoise")
    assert "all resident does not fit the 11.55 GiB VRAM budget" in slow
    assert "copies hide behind compute" in slow
    whole = Selection(weight_format="bf16")
    assert "compute waits" in reasons(plan_for(DEV, "rtx-4090-24gb", 16, selection=whole), "denoise")


def test_a_single_slot_is_told_in_the_singular() -> None:
    whole = Selection(weight_format="fp16", max_vram_bytes=5 * GIB)
    assert "through 1 slot of 1.83 GiB" in reasons(plan_for(DEV, "rtx-2060-6gb", selection=whole), "denoise")


def test_residency_says_that_it_fits() -> None:
    resident = plan_for(KLEIN_4B, "rtx-4090-24gb", selection=Selection(placement="resident"))
    assert "all 25 blocks resident: they fit" in reasons(resident, "denoise")


def test_a_less_faithful_format_says_why_not_the_better_ones() -> None:
    fast = plan_for(DEV, "rtx-4090-24gb", 32, selection=Selection(prefer="speed"), support=EVERYTHING)
    chosen = fast.stage("denoise").weight_format
    assert chosen not in ("bf16", "fp32")
    assert "not bf16: " in reasons(fast, "denoise")
    assert "prefer speed" in reasons(fast, "denoise")
    whole = Selection(placement="resident")
    small = plan_for(DEV, "rtx-4090-24gb", 64, selection=whole, support=EVERYTHING)
    assert "not bf16: needs" in reasons(small, "denoise")


def test_memory_is_given_as_the_reason_when_it_was_asked_for() -> None:
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=Selection(prefer="memory"))
    assert "prefer memory" in reasons(plan, "denoise")


def test_tiles_say_what_the_whole_picture_would_need() -> None:
    assert "untiled 6" in reasons(plan_for(KLEIN_4B, "rtx-2060-6gb", 64, px=2048), "decode")
    assert "asked for" in reasons(plan_for(KLEIN_4B, "rtx-3060-12gb", selection=Selection(vae_tile="512")), "decode")
    assert "untiled" in reasons(plan_for(KLEIN_4B, "rtx-3060-12gb"), "decode")
