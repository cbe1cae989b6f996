"""The explanation shows the promise, every stage, its memory, a step's time line, the reasons, and what would help."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

import pytest
from machines import DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE, UNQUANTIZED, machine, plan_for, spec, work
from rich.console import Console

from lowmem_flux2.planning.bars import BAR_WIDTH, LANE_WIDTH, device_parts, host_parts, step_lanes
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.improvements import improvements_of
from lowmem_flux2.planning.plan import Limits, Placement, Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.waits import steady_round
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.units import GIB, format_seconds


def shown(plan: Plan, width: int = 200, improvements: tuple[str, ...] = ()) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(explain(plan, spec(plan.model), improvements))
    return console.export_text()


@pytest.mark.parametrize("profile", ["rtx-2060-6gb", "rtx-3060-12gb", "h100-80gb", "cpu"])
@pytest.mark.parametrize("name", [DEV, KLEIN_BASE])
def test_it_shows_the_promise_and_every_stage(name: str, profile: str) -> None:
    plan = plan_for(name, profile, 32)
    text = shown(plan, width=400)  # no reason is broken over two lines
    assert f"{name} on {profile}: 1 image of 1024x1024, {plan.workload.steps} steps" in text
    assert f"peak RAM {plan.peak_ram_bytes / GIB:.2f}/{plan.limits.ram_bytes / GIB:.2f} GiB" in text
    assert ("peak VRAM" in text) == (profile != "cpu")
    assert f"about {format_seconds(plan.time_s)}" in text
    for stage in plan.stages:
        assert all(reason in text for reason in stage.reasons)


@pytest.mark.parametrize("prefer", ["quality", "balanced", "speed", "memory"])
@pytest.mark.parametrize(
    ("profile", "ram_gib"), [("rtx-2060-6gb", 16), ("rtx-3060-12gb", 32), ("rtx-4090-24gb", 64), ("cpu", 24)]
)
def test_it_is_one_screen_of_40_lines_and_100_columns(profile: str, ram_gib: int, prefer: str) -> None:
    for name in (DEV, KLEIN_9B):
        selection = Selection(prefer=prefer)  # type: ignore[arg-type]
        plan = plan_for(name, profile, ram_gib, selection=selection, support=EVERYTHING)
        helps = improvements_of(plan, spec(name), selection, EVERYTHING)
        lines = shown(plan, 100, helps).splitlines()
        assert len(lines) <= 40
        assert all(len(line) <= 100 for line in lines)
        bars = [line for line in lines if line.count("|") == 2]
        assert len(bars) >= (6 if profile != "cpu" else 3)  # none is broken over two lines


@pytest.mark.parametrize("prefer", ["balanced", "memory"])
def test_with_everything_asked_for_it_is_no_more_than_52_lines(prefer: str) -> None:
    """Five stages, two reference images, four images in batches, chunks, a cache with a long name; 80 columns too."""
    model, selection = spec(DEV), Selection(prefer=prefer, step_cache="taylor:interval=3,order=2")  # type: ignore[arg-type]
    workload = replace(work(DEV, 1024, 4, references=2), upsample_temperature=0.15)
    plan = make_plan(model, workload, machine("rtx-2060-6gb", 16), selection, profile="rtx-2060-6gb")
    lines = shown(plan, 100, improvements_of(plan, model, selection)).splitlines()
    assert len(lines) <= 52
    narrow = shown(plan, 80, improvements_of(plan, model, selection)).splitlines()
    assert "…" not in "".join([*lines, *narrow])
    assert all(len(line.rstrip()) <= 80 for line in narrow)
    for line in narrow:  # none is broken over two lines
        assert line.count("|") != 1 and (line.count("|") != 2 or "GiB: " in line or "%" in line)


@pytest.mark.parametrize("profile", ["rtx-3060-12gb", "cpu"])
def test_bars_add_up_to_the_peak_and_never_overflow(profile: str) -> None:
    plan = plan_for(DEV, profile, 32)
    bars = [line.split("|")[1] for line in shown(plan).splitlines() if line.count("|") == 2]
    on_device, on_host = bars[:3], bars[3:6] if profile != "cpu" else []
    for drawn, stage in zip(on_device, plan.stages, strict=True):
        peak = stage.cost.peak_vram_bytes or stage.cost.peak_ram_bytes
        limit = plan.limits.vram_bytes if profile != "cpu" else plan.limits.ram_bytes
        assert sum(size for *_, size in device_parts(stage)) == peak
        assert len(drawn) == BAR_WIDTH
        assert len(drawn.rstrip()) == pytest.approx(BAR_WIDTH * peak / limit, abs=1)
    for drawn, stage in zip(on_host, plan.stages, strict=False):
        parts = host_parts(stage)
        assert sum(size for *_, size in parts) == stage.cost.peak_ram_bytes
        assert all(size >= 0 for *_, size in parts)
        assert len(drawn.rstrip()) == pytest.approx(
            BAR_WIDTH * stage.cost.peak_ram_bytes / plan.limits.ram_bytes, abs=1
        )


def test_it_says_how_faithful_the_weights_are() -> None:
    assert "weights exact" in shown(plan_for(DEV, "rtx-3060-12gb"))
    quantized = plan_for(DEV, "rtx-3060-12gb", selection=Selection(weight_format="int8"))
    assert f"weight error {FORMATS['int8'].weight_error:.2g}" in shown(quantized)


def test_what_must_be_prepared_is_said_beside_the_time() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", selection=Selection(weight_format="int8"))
    text = shown(plan)
    assert f"before the first run: prepare transformer in int8, about {format_seconds(plan.prepare_s)}" in text
    assert "before the first run" not in shown(
        plan_for(DEV, "rtx-3060-12gb", selection=Selection(weight_format="bf16"))
    )


def test_decoding_alone_has_no_step() -> None:
    model, hardware = spec(KLEIN_4B), machine("rtx-3060-12gb")
    plan = make_plan(model, work(KLEIN_4B), hardware, Selection(), profile="rtx-3060-12gb", stages=("decode",))
    assert step_lanes(plan, model) == []
    starts = [line.split(" ")[0].removesuffix(":") for line in shown(plan).splitlines()]
    assert "decode" in starts and not {"encode", "denoise"} & set(starts)
    assert "denoised already" in shown(plan)


# ------------------------------------------------------------------------------------------------------ the time line


def lanes(plan: Plan) -> dict[str, str]:
    return {line[:8].strip(): line.split("|")[1] for line in step_lanes(plan, spec(plan.model)) if line.count("|") == 2}


def test_hidden_copies_leave_the_compute_lane_full() -> None:
    plan = plan_for(DEV, "rtx-3060-12gb", 96)
    drawn = lanes(plan)
    assert drawn["compute"] == "█" * LANE_WIDTH
    assert "disk" not in drawn
    assert step_lanes(plan, spec(DEV))[-1].strip() == "nothing waits: copies hide behind compute"


def test_a_disk_that_is_too_slow_is_waited_for() -> None:
    plan = plan_for(DEV, "rtx-4090-24gb", 16, selection=Selection(weight_format="bf16"))
    assert plan.stage("denoise").count(Placement.DISK)
    drawn, words = lanes(plan), step_lanes(plan, spec(DEV))
    assert drawn["disk"].count("▒") > 0.8 * LANE_WIDTH
    assert 0.2 * LANE_WIDTH < drawn["compute"].count("█") < 0.8 * LANE_WIDTH
    assert re.fullmatch(r"compute waits: [\d.]+ s for the disk, [\d.]+ s for copies", words[-1].strip())


@pytest.mark.parametrize(("profile", "ram_gib"), [("rtx-4090-24gb", 16), ("rtx-2060-6gb", 16), ("cpu", 8)])
def test_the_waits_are_all_of_a_round_that_computes_nothing(profile: str, ram_gib: int) -> None:
    plan = plan_for(DEV, profile, ram_gib, selection=Selection(prefer="quality"))
    for name in ("encode", "denoise"):
        stage = plan.stage(name)  # type: ignore[arg-type]
        work = stage_work(stage, spec(DEV), plan.workload, plan.hardware)
        drawn = steady_round(stage, work, plan.hardware)
        idle = drawn.end - drawn.start - sum(work.compute_ns) - work.between_ns
        assert sum(drawn.waits_ns.values()) == pytest.approx(idle, abs=1)
        if profile != "cpu":
            assert next(iter(drawn.waits_ns)) == "the disk"


def test_the_lanes_are_as_busy_as_the_cost_says() -> None:
    plan = plan_for(DEV, "rtx-4090-24gb", 32, selection=Selection(weight_format="bf16"))
    cost, steps = plan.stage("denoise").cost, plan.workload.steps
    for name, busy_s in (("disk", cost.read_s), ("copy", cost.copy_s), ("compute", cost.compute_s)):
        line = next(line for line in step_lanes(plan, spec(DEV)) if line.startswith(name))
        shares = int(line.rpartition(" ")[2].removesuffix("%")) / 100
        assert shares == pytest.approx(busy_s / cost.run_s, abs=0.03)
        assert format_seconds(busy_s / steps) in line


def test_all_resident_has_one_line() -> None:
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", selection=Selection(placement="resident"))
    (line,) = step_lanes(plan, spec(KLEIN_4B))
    assert "every block is resident" in line


# -------------------------------------------------------------------------------------------------- what would help


def helps(name: str, profile: str, ram_gib: int, **options: object) -> tuple[str, ...]:
    selection = Selection(**options)  # type: ignore[arg-type]
    plan = plan_for(name, profile, ram_gib, selection=selection, support=EVERYTHING)
    return improvements_of(plan, spec(name), selection, EVERYTHING)


def test_more_ram_is_offered_where_it_wins_time_or_fidelity_and_then_does() -> None:
    words = next(line for line in helps(DEV, "rtx-4090-24gb", 16, weight_format="bf16") if "RAM" in line)
    more = int(words.split()[0].removeprefix("+"))
    less, plan = (
        plan_for(DEV, "rtx-4090-24gb", gib, selection=Selection(weight_format="bf16"), support=EVERYTHING)
        for gib in (16, 16 + more)
    )
    assert plan.time_s < 0.9 * less.time_s
    assert format_seconds(plan.stage("denoise").cost.run_s / 28) in words


def test_no_ram_is_offered_where_nothing_rests_on_disk() -> None:
    assert not any("RAM" in line for line in helps(KLEIN_9B, "rtx-4090-24gb", 64, placement="resident"))


@pytest.mark.parametrize(
    ("name", "profile", "width", "height", "limits", "smaller"),
    [
        (DEV, "rtx-3060-12gb", 1024, 1024, {}, (768, 768)),
        (KLEIN_9B, "rtx-4060-laptop-8gb", 2048, 512, {}, (1536, 384)),
        (KLEIN_BASE, "a100-80gb", 1376, 768, {"max_vram_bytes": 2 * GIB}, (1024, 560)),  # then in int8, not bf16
    ],
)
def test_a_smaller_picture_is_of_the_same_shape_and_is_what_is_planned_then(
    name: str, profile: str, width: int, height: int, limits: dict[str, int], smaller: tuple[int, int]
) -> None:
    model, selection = spec(name), Selection(**limits)  # type: ignore[arg-type]

    def planned(width: int, height: int) -> Plan:
        request = make_request(model, ("x",), width=width, height=height)
        return make_plan(model, workload_of(request, model), machine(profile, 64), selection, profile=profile)

    plan, then = planned(width, height), planned(*smaller)
    words = next(line for line in improvements_of(plan, model, selection) if line[0].isdigit())
    before_s, after_s = (each.stage("denoise").cost.run_s / each.workload.steps for each in (plan, then))
    assert words.startswith(f"{smaller[0]}x{smaller[1]}: ")
    assert f"{format_seconds(after_s)} a step instead of {format_seconds(before_s)}" in words
    formats = [each.stage("denoise").weight_format for each in (then, plan)]
    assert (f"{formats[0]} instead of {formats[1]}" in words) == (formats[0] != formats[1])


def test_another_preference_is_offered_only_for_what_it_wins() -> None:
    words = helps(DEV, "rtx-4090-24gb", 24)
    assert any(line.startswith("--prefer quality: bf16 instead of int8") for line in words)
    assert not any("--prefer balanced" in line or "--prefer memory" in line for line in words)
    assert not any("--prefer quality" in line for line in helps(DEV, "rtx-4090-24gb", 24, prefer="quality"))


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
    assert "not all fit the 11.55 GiB VRAM budget" in slow
    assert "copies hide behind compute" in slow
    whole = Selection(weight_format="bf16")
    assert "compute waits" in reasons(plan_for(DEV, "rtx-4090-24gb", 16, selection=whole), "denoise")


def test_a_single_slot_is_told_in_the_singular() -> None:
    whole = Selection(weight_format="fp16", max_vram_bytes=4 * GIB)
    assert "through 1 slot of 1.83 GiB" in reasons(plan_for(DEV, "rtx-2060-6gb", selection=whole), "denoise")


def test_residency_says_that_it_fits() -> None:
    resident = plan_for(KLEIN_4B, "rtx-4090-24gb", selection=Selection(placement="resident"))
    assert "all 25 blocks resident: they fit" in reasons(resident, "denoise")


def test_a_less_faithful_format_says_why_not_the_better_ones() -> None:
    few = replace(EVERYTHING, weight_formats=EVERYTHING.weight_formats - {"int6", "w8a8"})
    fast = plan_for(DEV, "rtx-4090-24gb", 32, selection=Selection(prefer="speed"), support=few)
    assert fast.stage("denoise").weight_format == "nf4"
    assert "not int8: no less than 1 min" in reasons(fast, "denoise")
    assert "prefer speed" in reasons(fast, "denoise")
    whole = Selection(placement="resident")
    small = plan_for(DEV, "rtx-4090-24gb", 64, selection=whole, support=EVERYTHING)
    assert "not bf16: needs" in reasons(small, "denoise")


def test_memory_is_given_as_the_reason_when_it_was_asked_for() -> None:
    plan = plan_for(KLEIN_4B, "rtx-4090-24gb", 64, selection=Selection(prefer="memory"))
    assert "prefer memory" in reasons(plan, "denoise")


def test_tiles_say_what_the_whole_picture_would_need() -> None:
    assert "untiled 10" in reasons(plan_for(KLEIN_4B, "rtx-2060-6gb", 64, px=2048), "decode")
    assert "asked for" in reasons(plan_for(KLEIN_4B, "rtx-3060-12gb", selection=Selection(vae_tile="512")), "decode")
    assert "untiled" in reasons(plan_for(KLEIN_4B, "rtx-3060-12gb"), "decode")


def test_chunks_say_what_they_save() -> None:
    plan = plan_for(DEV, "rtx-4090-24gb", 64, images=4, support=EVERYTHING)
    assert plan.stage("denoise").chunk_tokens == 2048
    words = reasons(plan, "denoise")
    assert "chunks of 2048 tokens: activations of " in words
    assert " in one piece" in words
