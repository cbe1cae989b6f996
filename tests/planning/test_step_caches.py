"""Step caches as text, their schedules, what they keep and what they are said to cost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import KLEIN_4B, KLEIN_BASE, SUPPORTED, machine, spec, work

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import Plan, StagePlan
from lowmem_flux2.planning.planner import Selection, make_plan
from lowmem_flux2.planning.step_caches import (
    MEASURED,
    PRESETS,
    FirstBlock,
    StepCache,
    Taylor,
    automatic,
    fidelity_of_cache,
    parse_step_cache,
    step_cache_text,
    steps_taken,
)
from lowmem_flux2.planning.workload import Preference

COUNTS = {"order": st.integers(0, 2), "warmup": st.integers(1, 9), "last": st.integers(1, 9)}
CACHES = st.one_of(
    st.builds(FirstBlock, threshold=st.floats(0, 1), **COUNTS), st.builds(Taylor, interval=st.integers(1, 9), **COUNTS)
)


@given(CACHES)
def test_the_text_reads_back(cache: StepCache) -> None:
    assert parse_step_cache(str(cache)) == cache
    assert step_cache_text(str(cache)) == str(cache)


def test_short_forms() -> None:
    assert parse_step_cache("off") is None
    assert parse_step_cache("taylor:3") == Taylor(interval=3)
    assert parse_step_cache("first-block:0.1,last=2") == FirstBlock(threshold=0.1, last=2)
    assert str(FirstBlock(threshold=0.08)) == "first-block:threshold=0.08,order=1,warmup=3,last=1"
    assert {step_cache_text(name) for name in PRESETS} == {str(cache) for cache in PRESETS.values()}
    assert (step_cache_text("auto"), step_cache_text("off")) == ("auto", "off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fbc", "unknown: write off, auto, a preset .* 'first-block:threshold=0.08'"),
        ("", "unknown: write off"),
        ("taylor", "needs its interval: 'taylor:interval=2'"),
        ("first-block:order=1", "needs its threshold: 'first-block:threshold=0.08'"),
        ("taylor:threshold=0.1", "taylor has no 'threshold': one of interval, order, warmup, last"),
        ("taylor:2,3", "taylor has no '3'"),
        ("taylor:2,order=1,order=2", "order is given twice"),
        ("taylor:interval=0", "interval=0: a whole number from 1"),
        ("taylor:2,order=3", "order=3: a whole number from 0 to 2"),
        ("taylor:2,warmup=0", "warmup=0: a whole number from 1"),
        ("taylor:2,last=0", "last=0"),
        ("taylor:2.5", "interval=2.5"),
        ("first-block:nan", "threshold=nan: a number from 0"),
        ("first-block:1.5", "threshold=1.5"),
        ("first-block:x", "threshold=x"),
    ],
)
def test_errors_teach_the_grammar(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_step_cache(text)
    with pytest.raises(UsageError, match=f"--step-cache {text}: .*"):
        plan(KLEIN_BASE, step_cache=text)


@given(CACHES, st.integers(1, 60))
def test_schedules_compute_the_warm_up_and_the_last_steps(cache: StepCache, steps: int) -> None:
    computed = cache.computed_steps(steps)
    assert min(steps, max(cache.warmup, cache.last)) <= computed <= steps
    if isinstance(cache, Taylor):
        chosen = [step for step in range(steps) if cache.is_computed(step, steps)]
        assert len(chosen) == computed
        assert {step for step in range(steps) if step < cache.warmup or step >= steps - cache.last} <= set(chosen)
        assert all(later - earlier <= cache.interval for earlier, later in pairwise(chosen))
        assert cache.interval > 1 or computed == steps
    elif not cache.threshold:
        assert computed == steps


def plan(name: str, profile: str = "rtx-3060-12gb", steps: int | None = 20, **options: Any) -> Plan:
    workload = work(name, steps=steps)
    return make_plan(spec(name), workload, machine(profile), Selection(**options), profile=profile, support=SUPPORTED)


def denoise(name: str, **options: Any) -> StagePlan:
    return plan(name, **options).stage("denoise")


def test_a_skipped_step_costs_neither_compute_nor_transfers() -> None:
    fixed: dict[str, Any] = {"weight_format": "int8", "placement": "pinned"}
    off, taylor = denoise(KLEIN_BASE, **fixed, step_cache="off"), denoise(KLEIN_BASE, **fixed, step_cache="fair")
    computed = PRESETS["fair"].computed_steps(20)
    assert (off.cost.rounds, taylor.cost.rounds) == (20, computed)
    assert taylor.step_cache == str(PRESETS["fair"])
    assert taylor.cost.copy_s == pytest.approx(off.cost.copy_s * computed / 20)
    assert taylor.cost.compute_s == pytest.approx(off.cost.compute_s * computed / 20, rel=0.01)
    first = denoise(KLEIN_BASE, **fixed, step_cache="first-block:1")
    assert first.cost.rounds == FirstBlock(threshold=1.0).computed_steps(20) < 20
    blocks = first.cost.rounds + (20 - first.cost.rounds) / (25 * 17 / 20)  # a double-stream block of 25 blocks
    assert first.cost.compute_s == pytest.approx(off.cost.compute_s * blocks / 20, rel=0.1)


def test_what_is_kept_counts_as_activations() -> None:
    model, base = spec(KLEIN_BASE), work(KLEIN_BASE, steps=20)
    two = replace(base, guidance_passes=2, num_images=3)
    assert steps_taken("off", model, base, 1, 2) == (20, 0, 0, 0)
    # 4096 tokens of 1024 px: h = 3072, 128 channels, 2 bytes
    assert steps_taken("taylor:2,order=2", model, base, 1, 2).kept_bytes == 3 * 4096 * 128 * 2
    assert steps_taken("first-block:0.1,order=0", model, two, 3, 2).kept_bytes == 2 * 3 * (2 * 4096 + 512) * 3072 * 2
    for name in ("fair", "first-block:0.1,order=1"):
        off, cached = (
            denoise(KLEIN_BASE, placement="resident", profile="h100-80gb", step_cache=cache) for cache in ("off", name)
        )
        kept = steps_taken(name, model, base, 1, 2).kept_bytes
        assert cached.cost.activation_bytes - off.cost.activation_bytes >= kept


@pytest.mark.parametrize("prefer", get_args(Preference))
def test_auto_takes_one_only_for_speed_and_where_it_is_measured(prefer: Preference) -> None:
    stage = denoise(KLEIN_BASE, prefer=prefer)
    assert stage.step_cache == "off"
    assert any(reason.startswith("no step cache: ") for reason in stage.reasons)
    model, hardware = replace(spec(KLEIN_BASE), name="shapes"), machine("rtx-3060-12gb")
    selection = Selection(prefer=prefer)
    made = make_plan(model, work(KLEIN_BASE, steps=20), hardware, selection, profile="x", support=SUPPORTED)
    assert (made.stage("denoise").step_cache != "off") == (prefer == "speed")


@pytest.mark.parametrize(("name", "steps", "why"), [(KLEIN_4B, 20, "a distilled model"), (KLEIN_BASE, 4, "4 steps")])
def test_few_steps_are_all_computed(name: str, steps: int, why: str) -> None:
    stage = denoise(name, prefer="speed", steps=steps)
    assert stage.step_cache == "off"
    assert any(reason.startswith("no step cache") and why in reason for reason in stage.reasons)
    assert denoise(name, prefer="speed", steps=steps, step_cache="fine").step_cache == str(PRESETS["fine"])


def test_reasons_say_what_a_cache_skips_and_what_it_rests_on() -> None:
    stage = denoise(KLEIN_BASE, step_cache="fair")
    assert any("computes 9 of 20 steps" in reason for reason in stage.reasons)
    assert any("assumed" in reason for reason in denoise(KLEIN_BASE, step_cache="first-block:0.5").reasons)
    assert any("skips none of 4" in reason for reason in denoise(KLEIN_BASE, steps=4, step_cache="coarse").reasons)


def test_fidelity_is_priced() -> None:
    assert fidelity_of_cache(PRESETS["fine"], steps=3) == (0.0, "")  # nothing is skipped
    assert fidelity_of_cache(None, 20) == (0.0, "")
    errors = [fidelity_of_cache(cache, 20)[0] for cache in PRESETS.values()]
    assert errors == sorted(errors) and errors[0] > 0
    assert errors == [MEASURED[cache].latents_error for cache in PRESETS.values()]
    between, provenance = fidelity_of_cache(Taylor(interval=3, order=0), 20)
    assert between >= errors[1] and "not measured" in provenance
    stage = denoise(KLEIN_BASE, weight_format="int8", step_cache="fair")
    assert stage.cost.fidelity_error == pytest.approx((errors[1] ** 2 + FORMATS["int8"].weight_error ** 2) ** 0.5)
    assert "step cache" in stage.cost.fidelity_provenance


def test_plan_files_hold_the_text_in_full() -> None:
    made = plan(KLEIN_BASE, step_cache="coarse")
    raw = json.loads(json.dumps(made.to_json()))
    assert Plan.from_json(raw, "plan.json") == made
    raw["stages"][1]["step_cache"] = "magic"
    with pytest.raises(UsageError, match=r"stages.1.step_cache: 'magic': unknown"):
        Plan.from_json(raw, "plan.json")
    assert made.digest != plan(KLEIN_BASE, step_cache="off").digest


def test_automatic_is_ordered_from_the_most_faithful() -> None:
    caches, why = automatic(replace(spec(KLEIN_BASE), name="shapes"), work(KLEIN_BASE, steps=20), "speed")
    assert caches and not why
    assert [fidelity_of_cache(cache, 20)[0] for cache in caches] == sorted(
        fidelity_of_cache(cache, 20)[0] for cache in caches
    )


def test_measured_figures_are_those_of_the_result_file() -> None:
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity-shapes.json"
    rows = {row["name"]: row for row in json.loads(file.read_text())["results"]}
    named: dict[str, StepCache] = {**PRESETS, "taylor 6": Taylor(interval=6, warmup=3)}
    named |= {f"first-block {threshold}": FirstBlock(threshold=threshold) for threshold in (0.1, 0.2, 0.3)}
    named["first-block 0.2, order 0"] = FirstBlock(threshold=0.2, order=0)
    assert set(named.values()) == set(MEASURED)
    for name, cache in named.items():
        row = rows[f"step cache {name}"]
        error, decibels = row["latents_error_worst"], row["psnr_db_worst"]
        assert MEASURED[cache] == (round(error, 4), round(decibels, 1))
