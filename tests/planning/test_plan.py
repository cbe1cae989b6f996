"""Plans as files: written, read back whole, and refused with the key that is wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from machines import DEV, KLEIN_4B, KLEIN_9B, plan_for

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.plan import SCHEMA_VERSION, Placement, Plan, read_plan
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.stage_cost import StageCost
from lowmem_flux2.planning.support import EVERYTHING

REAL = [
    pytest.param(lambda: plan_for(DEV, "rtx-3060-12gb", 32), id="dev streamed from all tiers"),
    pytest.param(lambda: plan_for(KLEIN_9B, "rtx-2060-6gb", images=3, prompts=2), id="turing, batches"),
    pytest.param(lambda: plan_for(KLEIN_4B, "cpu", selection=Selection(prefer="memory")), id="cpu"),
    pytest.param(
        lambda: plan_for(DEV, "rtx-4060-8gb", px=2048, selection=Selection(prefer="memory"), support=EVERYTHING),
        id="quantized, chunked, tiled",
    ),
]


@pytest.fixture
def plan() -> Plan:
    return plan_for(DEV, "rtx-3060-12gb", 32)


@pytest.fixture
def raw(plan: Plan) -> dict[str, Any]:
    return json.loads(json.dumps(plan.to_json()))


@pytest.mark.parametrize("make", REAL)
def test_a_plan_survives_its_json_whole(make: Any) -> None:
    plan = make()
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), "x.json")
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.digest == plan.digest


@pytest.mark.parametrize("make", REAL)
def test_the_json_has_every_key_of_the_contract(make: Any) -> None:
    plan = make()
    raw = json.loads(json.dumps(plan.to_json()))
    assert {"schema_version", "profile", "model", "workload", "stages", "predicted"} <= raw.keys()
    assert raw["schema_version"] == SCHEMA_VERSION
    assert raw["predicted"] == {
        "peak_vram_bytes": plan.peak_vram_bytes,
        "peak_ram_bytes": plan.peak_ram_bytes,
        "time_s": plan.time_s,
        "prepare_s": plan.prepare_s,
        "fidelity_error": plan.fidelity_error,
    }
    assert [stage["stage"] for stage in raw["stages"]] == ["encode", "denoise", "decode"]
    for stage in raw["stages"]:
        assert {
            "stage",
            "component",
            "weight_format",
            "compute_dtype",
            "placements",
            "block_placements",
            "non_block_placement",
            "prefetch_depth",
            "slots",
            "chunk_tokens",
            "tile_px",
            "step_cache",
            "cost",
        } <= stage.keys()
        assert stage["placements"] == {
            name: stage["block_placements"].count(name) for name in ("gpu", "pinned", "pageable", "disk")
        }
        assert {field.name for field in fields(StageCost)} <= stage["cost"].keys()


def test_the_peaks_are_the_maxima_over_the_stages_and_times_add_up(plan: Plan) -> None:
    costs = [stage.cost for stage in plan.stages]
    assert plan.peak_vram_bytes == max(cost.peak_vram_bytes for cost in costs)
    assert plan.peak_ram_bytes == max(cost.peak_ram_bytes for cost in costs)
    assert plan.time_s == pytest.approx(sum(cost.load_s + cost.run_s for cost in costs))
    assert plan.fidelity_error == pytest.approx(sum(cost.fidelity_error**2 for cost in costs) ** 0.5)


def test_a_stage_counts_its_placements(plan: Plan) -> None:
    denoise = plan.stage("denoise")
    assert sum(denoise.count(placement) for placement in Placement) == 56
    assert denoise.streamed == 56 - denoise.count(Placement.GPU)


def test_the_digest_is_stable_and_changes_with_the_plan(plan: Plan) -> None:
    assert plan.digest == plan_for(DEV, "rtx-3060-12gb", 32).digest
    assert len(plan.digest) == 12
    other = replace(plan, stages=(*plan.stages[:2], replace(plan.stages[2], tile_px=512)))
    assert other.digest != plan.digest
    assert replace(plan, guidance_scale=3.5).digest != plan.digest


def test_the_digest_is_of_what_decides_pixels_and_not_of_the_machine(plan: Plan) -> None:
    """An image made from the same placements carries the same hash wherever, whatever that was predicted to cost."""
    stages = tuple(replace(stage, cost=StageCost(), reasons=("any",)) for stage in plan.stages)
    limits = replace(plan.limits, ram_bytes=1)
    hardware = replace(plan.hardware, provenance={}, ram_bytes=1)
    assert replace(plan, stages=stages, limits=limits, hardware=hardware, profile="x").digest == plan.digest
    moved = replace(plan.stages[1], block_placements=plan.stages[1].block_placements[::-1])
    assert replace(plan, stages=(plan.stages[0], moved, plan.stages[2])).digest != plan.digest


# ----------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("value", [None, 3, "plan", [], {}, {"stages": 3}, {"stages": {}}])
def test_other_json_is_not_a_plan(value: object) -> None:
    with pytest.raises(UsageError, match=r"x\.json: not a plan file"):
        Plan.from_json(value, "x.json")


def test_another_schema_is_refused(raw: dict[str, Any]) -> None:
    raw["schema_version"] = 99
    with pytest.raises(UsageError, match="plan schema 99, this version reads 1"):
        Plan.from_json(raw, "x.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, "surprise"),
        (("stages", 1, "surprise"), 1, r"stages\.1\.surprise"),
        (("stages", 1, "cost", "surprise"), 1, r"stages\.1\.cost\.surprise"),
        (("workload", "surprise"), 1, r"workload\.surprise"),
        (("hardware", "surprise"), 1, r"hardware\.surprise"),
        (("stages", 1, "block_placements", 0), "tape", r"stages\.1\.block_placements\.0"),
        (("stages", 1, "weight_format"), "int3", r"stages\.1\.weight_format: 'int3'"),
        (("stages", 2, "compute_dtype"), "fp8", r"stages\.2\.compute_dtype: 'fp8'"),
        (("stages", 0, "slots"), "many", r"stages\.0\.slots"),
        (("stages", 0), 7, r"stages\.0"),
        (("limits",), None, "limits"),
    ],
)
def test_a_wrong_key_or_value_is_named(raw: dict[str, Any], path: tuple[Any, ...], value: object, message: str) -> None:
    at = raw
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(UsageError, match=f"x.json: {message}"):
        Plan.from_json(raw, "x.json")


def test_a_missing_key_is_named(raw: dict[str, Any]) -> None:
    del raw["stages"][0]["slots"]
    with pytest.raises(UsageError, match=r"stages\.0\.slots: "):
        Plan.from_json(raw, "x.json")


def test_stages_must_be_the_three_in_order(raw: dict[str, Any]) -> None:
    for stages in (raw["stages"][:2], raw["stages"][::-1], []):
        changed = copy.deepcopy(raw) | {"stages": stages}
        with pytest.raises(UsageError, match="stages: must be encode, denoise, decode"):
            Plan.from_json(changed, "x.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_a_file_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="not a readable plan file"):
        read_plan(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such plan file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(UsageError, match="not a readable plan file"):
        read_plan(tmp_path)


def test_a_plan_file_is_read_back(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert read_plan(path) == plan
