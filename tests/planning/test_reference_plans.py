"""Reference images in a plan: their sizes, their tokens, a stage of their own, and what all that costs."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, KLEIN_BASE, machine, spec
from PIL import Image
from rich.console import Console

from lowmem_flux2.errors import DoesNotFit, PlanMismatch, UsageError
from lowmem_flux2.planning.advice import closest_fits
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.ladder import next_rung
from lowmem_flux2.planning.plan import Plan, stages_of
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.references import (
    MOST_REFERENCES,
    Reference,
    picture_size,
    reduced,
    reference_of,
    references_of,
)
from lowmem_flux2.planning.replay import check_plan, check_replay
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.workload import Request, Workload, make_request, workload_of
from lowmem_flux2.units import MIB

CARD = "rtx-3060-12gb"
GUIDANCE = 4.0


def request_with(model: str, *sizes: tuple[int, int], prompts: int = 1) -> Request:
    references = tuple(Reference(f"{index}.png", *size) for index, size in enumerate(sizes))
    return make_request(spec(model), ("x",) * prompts, references=references, width=1024, height=1024)


def work(model: str, *sizes: tuple[int, int]) -> Workload:
    return workload_of(request_with(model, *sizes), spec(model))


def plan_with(model: str, *sizes: tuple[int, int], selection: Selection | None = None, profile: str = CARD) -> Plan:
    chosen = selection or Selection()
    return make_plan(
        spec(model), work(model, *sizes), machine(profile), chosen, profile=profile, guidance_scale=GUIDANCE
    )


# ------------------------------------------------------------------------------------------------------------ sizes


@given(st.integers(64, 6000), st.integers(64, 6000), st.sampled_from([64, 512, 1024, 2048]))
def test_a_picture_is_bounded_by_its_area_cropped_to_multiples_and_never_enlarged(
    width: int, height: int, bound: int
) -> None:
    made = reduced(width, height, 16, bound)
    assert all(side % 16 == 0 and side <= whole for side, whole in zip(made, (width, height), strict=True))
    assert made[0] * made[1] <= bound**2
    if width * height <= bound**2:
        assert made == (width // 16 * 16, height // 16 * 16)
    elif max(width, height) <= 8 * min(width, height):
        assert min(made) >= 16
        assert abs(made[0] * height - made[1] * width) <= 17 * (width + height)  # the shape is kept, to a patch


@pytest.mark.parametrize(
    ("size", "bound", "said"),
    [
        ((63, 900), 1024, "too small for a reference: at least 64 px"),
        ((900, 100), 1024, "too long for a reference: at most 8:1"),
        ((900, 900), 63, "image size must be 64 to 2048"),
        ((900, 900), 4096, "image size must be 64 to 2048"),
    ],
)
def test_an_impossible_reference_is_refused(size: tuple[int, int], bound: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        reference_of("a.png", *size, 16, bound)


def test_sizes_of_files_are_those_that_are_seen(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (200, 100)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert picture_size(tmp_path / "a.jpg") == (100, 200)
    assert picture_size(tmp_path / "b.png") == (200, 100)
    with pytest.raises(UsageError, match=r"c\.png: this is no picture"):
        picture_size(tmp_path / "c.png")
    with pytest.raises(UsageError, match="there is no such reference image"):
        picture_size(tmp_path / "d.png")
    found = references_of([str(tmp_path / "b.png"), "3000x3000"], 16, may_be_sizes=True)
    assert [(one.width, one.height) for one in found] == [(192, 96), (1024, 1024)]
    with pytest.raises(UsageError, match="a size stands for a picture in 'plan' only"):
        references_of(["3000x3000"], 16)


def test_the_picture_takes_the_size_of_the_first_reference_unless_asked() -> None:
    references = (Reference("a", 640, 400), Reference("b", 512, 512))
    made = make_request(spec(DEV), ("x",), references=references)
    assert (made.width, made.height) == (640, 400)
    made = make_request(spec(DEV), ("x",), references=references, width=256)
    assert (made.width, made.height) == (256, 400)
    with pytest.raises(UsageError, match="11 reference images: at most 10"):
        make_request(spec(DEV), ("x",), references=references[:1] * (MOST_REFERENCES + 1))


# -------------------------------------------------------------------------------------------------------- the stage


@pytest.mark.parametrize("model", [DEV, KLEIN_4B, KLEIN_BASE])
def test_a_stage_of_its_own_only_where_there_are_references(model: str) -> None:
    plain, edit = plan_with(model), plan_with(model, (1024, 768), (512, 512))
    assert [stage.stage for stage in plain.stages] == ["encode", "denoise", "decode"]
    assert [stage.stage for stage in edit.stages] == ["encode", "reference", "denoise", "decode"]
    assert edit.workload.reference_tokens == 64 * 48 + 32 * 32
    assert edit.stage("denoise").cost.run_s > plain.stage("denoise").cost.run_s
    stage = edit.stage("reference")
    assert (stage.component, stage.tile_px, stage.cost.rounds) == ("vae", 0, 2)
    weights = spec(model).vae.encoder_weights * 2
    assert weights <= stage.cost.resident_bytes <= 1.01 * weights
    assert stage.cost.activation_bytes > 640 * 1024 * 768 * 2
    assert 0 < stage.cost.run_s < edit.stage("decode").cost.run_s * 2
    assert edit.fidelity_error == edit.stage("denoise").cost.fidelity_error


def test_more_and_larger_references_never_cost_less() -> None:
    sizes = [(256, 256), (512, 768), (1024, 1024)]
    plans = [plan_with(KLEIN_4B, *sizes[:count]) for count in range(4)]
    costs = [plan.stage("denoise").cost for plan in plans]
    assert [cost.activation_bytes for cost in costs] == sorted({cost.activation_bytes for cost in costs})
    assert [cost.compute_s for cost in costs] == sorted({cost.compute_s for cost in costs})
    encoded = [plan.stage("reference").cost for plan in plans[1:]]
    assert [cost.activation_bytes for cost in encoded] == sorted({cost.activation_bytes for cost in encoded})


def test_it_is_tiled_where_a_whole_picture_does_not_fit_and_on_the_ladder() -> None:
    plan = plan_with(KLEIN_4B, (1024, 1024), (256, 256), profile="rtx-4090-24gb")
    tiles = []
    lower: Plan | None = plan
    while (lower := next_rung(lower, "reference", spec(KLEIN_4B))) is not None:
        tiles.append(lower.stage("reference").tile_px)
        assert lower.stage("denoise") == plan.stage("denoise")
    assert len(tiles) >= 2 and tiles == sorted(tiles, reverse=True)
    small = plan_with(KLEIN_4B, (1024, 1024), selection=Selection(max_vram_bytes=1300 * MIB, weight_format="nf4"))
    assert small.stage("reference").tile_px
    assert "untiled" in "; ".join(small.stage("reference").reasons)
    fixed = plan_with(KLEIN_4B, (1024, 1024), (256, 256), selection=Selection(vae_tile="512"))
    assert fixed.stage("reference").tile_px == fixed.stage("decode").tile_px == 512


def test_plans_of_references_are_files_like_any_other() -> None:
    plan = plan_with(DEV, (1024, 768), (512, 512))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), "plan.json")
    assert again == plan
    check_plan(again, spec(DEV))
    swapped = replace(plan.workload, references=plan.workload.references[::-1])
    assert replace(plan, workload=swapped).digest != plan.digest  # the order decides pixels
    asked = request_with(DEV, (1024, 768), (512, 512))
    assert check_replay(plan, spec(DEV), asked, machine(CARD), "plan.json").stages == plan.stages
    with pytest.raises(PlanMismatch, match=r"references: plan \(1024, 768\), \(512, 512\), here none"):
        check_replay(plan, spec(DEV), request_with(DEV), machine(CARD), "plan.json")
    raw = plan.to_json()
    raw["stages"] = [stage for stage in raw["stages"] if stage["stage"] != "reference"]
    with pytest.raises(UsageError, match="stages: must be encode, reference, denoise, decode"):
        Plan.from_json(raw, "plan.json")
    assert stages_of(plan_with(DEV).workload) == ("encode", "denoise", "decode")


@pytest.mark.parametrize(
    ("key", "value"), [("batch_size", 2), ("tile_px", 100), ("weight_format", "int8"), ("component", "transformer")]
)
def test_a_stage_of_references_that_contradicts_itself_is_refused(key: str, value: object) -> None:
    plan = plan_with(DEV, (512, 512))
    stages = tuple(replace(one, **{key: value}) if one.stage == "reference" else one for one in plan.stages)
    with pytest.raises(UsageError, match=f"stage reference: {key} is"):
        check_plan(replace(plan, stages=stages), spec(DEV))


# ------------------------------------------------------------------------------------------------------- in words


def shown(plan: Plan, model: str) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(explain(plan, spec(model)))
    text = console.file.getvalue()
    assert isinstance(text, str)
    return text


def test_the_explanation_gives_each_references_tokens_and_what_they_add() -> None:
    text = shown(plan_with(DEV, (1024, 768), (512, 512)), DEV)
    words = " ".join(text.split())
    assert "2 reference images: 1024x768 3072 tokens, 512x512 1024 tokens; a step sees 8704 tokens, not 4608" in words
    bars = [line for line in text.splitlines() if line.startswith(("encode", "reference", "denoise")) and "|" in line]
    assert len({line.index("|") for line in bars if "GiB:" in line}) == 1
    assert "reference" not in shown(plan_with(DEV), DEV)


def test_what_would_fit_instead_is_a_command_of_smaller_references() -> None:
    sizes = ((1024, 1024),) * 6
    cap = plan_with(DEV, (512, 512), selection=Selection(prefer="memory")).peak_vram_bytes
    selection = Selection(max_vram_bytes=cap)
    with pytest.raises(DoesNotFit):
        plan_with(DEV, *sizes, selection=selection)
    found = closest_fits(spec(DEV), work(DEV, *sizes), machine(CARD), selection, CARD)
    assert found and all("--image" in command for command in found)
    commands = closest_fits(spec(DEV), work(DEV, (640, 480)), machine(CARD), Selection(max_vram_bytes=MIB), CARD)
    assert all("-W 1024 -H 1024" in command or "-W 256" in command for command in commands)
