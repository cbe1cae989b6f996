"""The upsample stage in a plan: there only when asked for, priced in closed form, placed by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from machines import DEV, KLEIN_9B, SUPPORTED, machine, spec, work

from lowmem_flux2.errors import PlanMismatch, UsageError
from lowmem_flux2.planning.changes import Change
from lowmem_flux2.planning.cost import stage_cost
from lowmem_flux2.planning.ladder import next_format, next_rung, peak_bytes
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.references import Reference
from lowmem_flux2.planning.replay import check_replay
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.upsampling import NEW_TOKENS, PROMPT_TOKENS, cache_bytes
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.units import MIB

CARD = machine("rtx-4090-24gb", 64)


def planned(temperature: float | None = 0.15, prompts: int = 1, selection: Selection | None = None) -> Plan:
    asked = replace(work(DEV, prompts=prompts), upsample_temperature=temperature)
    return make_plan(
        spec(DEV), asked, CARD, selection or Selection(), profile="x", guidance_scale=4.0, support=SUPPORTED
    )


@pytest.mark.parametrize("prefer", ["balanced", "quality", "speed", "memory"])
def test_it_is_there_only_when_asked_for_and_changes_no_other_stage(prefer: Any) -> None:
    with_it, without = (
        planned(0.15, selection=Selection(prefer=prefer)),
        planned(None, selection=Selection(prefer=prefer)),
    )
    assert [stage.stage for stage in with_it.stages] == ["upsample", "encode", "denoise", "decode"]
    if prefer != "memory":
        assert [stage.weight_format for stage in with_it.stages[1:]] == [each.weight_format for each in without.stages]
    upsample = with_it.stage("upsample")
    assert (upsample.component, upsample.prepared_as, upsample.compute_dtype) == (
        "text_encoder",
        "whole_text_encoder",
        "bf16",
    )
    assert len(upsample.block_placements) == spec(DEV).text_encoder.num_layers == 40
    assert with_it.peak_vram_bytes <= with_it.limits.vram_bytes


@pytest.mark.parametrize("rate", ["memory_bytes_per_s", "matmul_flops_per_s"])
def test_a_faster_machine_never_makes_it_slower(rate: str) -> None:
    """Also where the tokens hide behind the disk, so that what they save is saved of nothing."""
    stage = replace(
        StagePlan.bare("upsample", "bf16", "bf16"),
        block_placements=(Placement.GPU,) * 13 + (Placement.DISK,) * 27,
        slots=2,
    )
    cpu = machine("cpu", 32)

    def time_s(factor: float) -> float:
        now = getattr(cpu, rate)
        faster = {name: factor * each for name, each in now.items()} if isinstance(now, dict) else int(factor * now)
        return stage_cost(stage, spec(DEV), work(DEV), replace(cpu, **{rate: faster})).time_s

    assert time_s(3) <= time_s(1.3) <= time_s(1)


def test_the_cache_and_lm_head_are_counted() -> None:
    dims = spec(DEV).text_encoder
    assert cache_bytes(dims, 1, PROMPT_TOKENS + NEW_TOKENS, 2) == 2 * 40 * 1024 * 2560 * 2  # 400 MiB
    works = [
        stage_work(replace(StagePlan.bare("upsample", "bf16", "bf16"), batch_size=prompts), spec(DEV), work(DEV), CARD)
        for prompts in (1, 2)
    ]
    assert works[0].kept_bytes / MIB == pytest.approx(2 * 131072 * 5120 / MIB, abs=0.1)  # lm_head
    assert works[0].rounds == NEW_TOKENS
    assert works[0].activation_bytes > cache_bytes(dims, 1, PROMPT_TOKENS, 2)
    assert works[1].activation_bytes == pytest.approx(2 * works[0].activation_bytes, rel=0.01)


def test_a_plan_is_read_back_replayed_and_told_apart() -> None:
    plan = planned()
    assert Plan.from_json(json.loads(json.dumps(plan.to_json())), "x") == plan
    assert plan.digest not in {planned(0.3).digest, planned(None).digest}
    request = make_request(spec(DEV), ("x",), caption_upsample_temperature=0.15)
    check_replay(plan, spec(DEV), request, CARD, "p")
    with pytest.raises(PlanMismatch, match=r"upsample_temperature: plan 0\.15, here None"):
        check_replay(plan, spec(DEV), replace(request, caption_upsample_temperature=None), CARD, "p")
    fewer = replace(plan.stage("upsample"), batch_size=1)
    stages = (fewer, *planned(prompts=2).stages[1:])
    with pytest.raises(UsageError, match="all prompts are rewritten together"):
        check_replay(
            replace(planned(prompts=2), stages=stages),
            spec(DEV),
            make_request(spec(DEV), ("x", "y"), caption_upsample_temperature=0.15),
            CARD,
            "p",
        )


@pytest.mark.parametrize("weight_format", ["auto", "bf16", "nf4"])
def test_its_rungs_have_lower_peaks_and_the_same_format(weight_format: str) -> None:
    plan = planned(selection=Selection(text_weight_format=weight_format))
    begun = plan.stage("upsample")
    rungs = 0
    while (lower := next_rung(plan, "upsample", spec(DEV), SUPPORTED)) is not None and rungs < 4:
        assert peak_bytes(lower.stage("upsample")) < peak_bytes(plan.stage("upsample"))
        assert lower.stage("upsample").weight_format == begun.weight_format
        plan, rungs = lower, rungs + 1
    assert rungs
    coarser = next_format(planned(selection=Selection(text_weight_format="bf16")), "upsample", spec(DEV), SUPPORTED)
    assert coarser is not None and coarser.stage("upsample").weight_format == "int8"


def test_printed_commands_keep_it() -> None:
    change = Change(spec(DEV), planned().workload, CARD, Selection())
    assert "--caption-upsample 0.15" in change.command("x")
    assert "--caption-upsample" not in change.with_model(KLEIN_9B).command("x")


def test_what_has_no_upsampling_is_refused() -> None:
    with pytest.raises(UsageError, match="flux2-klein-9b is of the klein form, whose pipeline has none"):
        make_request(spec(KLEIN_9B), ("x",), caption_upsample_temperature=0.15)
    for temperature in (-1.0, float("nan"), float("inf"), 11.0):
        with pytest.raises(UsageError, match="temperature must be above 0"):
            make_request(spec(DEV), ("x",), caption_upsample_temperature=temperature)
    assert make_request(spec(DEV), ("x",), caption_upsample_temperature=0.0).caption_upsample_temperature is None


def test_reference_images_are_seen_and_counted() -> None:
    reference = Reference("a.png", 512, 512)
    request = make_request(spec(DEV), ("x",), caption_upsample_temperature=0.15, references=(reference,))
    stage = replace(StagePlan.bare("upsample", "bf16", "bf16"), batch_size=1)
    seeing, blind = (
        stage_work(stage, spec(DEV), workload_of(asked, spec(DEV)), CARD)
        for asked in (request, replace(request, references=()))
    )
    vision = spec(DEV).text_encoder.vision
    assert vision is not None and blind.once_bytes == 0
    assert seeing.once_bytes > 2 * vision.weights > 800_000_000
    assert seeing.first_ns > blind.first_ns
    assert seeing.other_file_bytes - blind.other_file_bytes == 2 * vision.weights
    text = replace(spec(DEV).text_encoder, vision=None)
    with pytest.raises(UsageError, match="has no vision part; leave one of the two out"):
        make_request(
            replace(spec(DEV), text_encoder=text),
            ("x",),
            caption_upsample_temperature=0.15,
            references=(reference,),
        )


def test_quantized_layers_are_planned_and_prepared_once() -> None:
    plan = planned(selection=Selection(text_weight_format="int8"))
    assert [stage.weight_format for stage in plan.stages[:2]] == ["int8", "int8"]
    (made,) = (each for each in plan.preparations if "text_encoder" in each.component)
    assert made.component == "whole_text_encoder"
    assert made.write_bytes > 0.9 * made.read_bytes / 2 > 20e9
    again = make_plan(
        spec(DEV),
        plan.workload,
        CARD,
        Selection(text_weight_format="int8"),
        profile="x",
        support=SUPPORTED,
        prepared={("whole_text_encoder", "int8", "bf16")},
    )
    assert not [each for each in again.preparations if "text_encoder" in each.component]
    assert plan.fidelity_error == planned(None, selection=Selection(text_weight_format="int8")).fidelity_error
    assert planned(selection=Selection(prefer="quality")).stage("upsample").weight_format == "bf16"
    assert planned(selection=Selection(prefer="speed")).stage("upsample").weight_format != "bf16"
