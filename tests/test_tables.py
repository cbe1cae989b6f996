"""The table of plans: what stands in the README is what is planned now, of every profile."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest

from lowmem_flux2.planning.hardware import list_profiles
from lowmem_flux2.tables import COMMON, MODELS, RAM_SIZES_GIB, Row, document, markdown, rows

ROOT = Path(__file__).parents[1]


@cache
def every() -> tuple[Row, ...]:
    return tuple(rows(list_profiles()))


def test_every_shipped_profile_is_there_with_each_model_and_size_of_ram() -> None:
    found = {(row.profile, row.model, row.ram_gib) for row in every()}
    assert found == {(profile, name, gib) for profile in list_profiles() for name in MODELS for gib in RAM_SIZES_GIB}


def test_plans_keep_to_the_card_and_to_the_ram() -> None:
    for row in every():
        if row.plan is not None:
            assert row.plan.hardware.ram_bytes == row.ram_gib << 30
            assert row.plan.peak_ram_bytes < row.ram_gib << 30
            assert row.plan.peak_vram_bytes <= row.plan.limits.vram_bytes


def test_no_step_is_faster_than_its_roofline() -> None:
    for row in every():
        if row.plan is not None and row.bounds is not None:
            step_s = row.plan.stage("denoise").cost.run_s / row.plan.workload.steps
            assert step_s >= row.bounds.bound_s * (1 - 1e-9)
            assert row.bounds.bound_s >= row.bounds.compute_s > 0


def test_the_readme_shows_what_is_planned() -> None:
    spec = importlib.util.spec_from_file_location("plans", ROOT / "tools" / "plans.py")
    assert spec is not None and spec.loader is not None
    plans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plans)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(readme.count(mark) == 1 for mark in (*plans.EXAMPLE, *plans.PLANS, *plans.OTHERS))
    plans.rows = lambda names: [row for name in names for row in every() if row.profile == name]
    assert readme == plans.rewritten(readme), "run: python tools/plans.py"
    assert set(markdown(every()).splitlines()) <= set(readme.splitlines())


def test_the_document_is_the_table() -> None:
    """What ``plan --table`` prints."""
    name = list_profiles()[0]
    assert document([name]).endswith(f"{markdown(row for row in every() if row.profile == name)}\n")


def test_sizes_of_ram_without_a_difference_share_a_line() -> None:
    lines = markdown(rows(["h100-80gb"], ["flux2-klein-4b"])).splitlines()
    assert len(lines) == 3
    assert "| 16, 32, 64 |" in lines[2]
    assert set(COMMON) <= set(list_profiles())


@pytest.mark.parametrize("profile", ["rtx-2060-6gb", "h100-80gb"])
def test_what_does_not_fit_says_so(profile: str) -> None:
    row = Row(profile, 16, "flux2-dev", None, None)
    assert "does not fit" in markdown([row])
    assert markdown([row]).splitlines()[-1].count("|") == 10
