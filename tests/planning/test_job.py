"""From arguments to a plan: the machine, the caps, RAM in use now, and replays."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from machines import DEV, KLEIN_4B, machine

from lowmem_flux2.errors import DoesNotFit, PlanMismatch, ProfileError, UsageError
from lowmem_flux2.planning import job
from lowmem_flux2.planning.hardware import profiles_dir
from lowmem_flux2.planning.job import Machine, free_vram_bytes, plan_job, replay, resolve_machine
from lowmem_flux2.planning.nvml import NvmlCard
from lowmem_flux2.planning.planner import Selection, limits_of
from lowmem_flux2.planning.sources import ModelSource, resolve_model
from lowmem_flux2.planning.workload import Request, make_request
from lowmem_flux2.units import GIB, MIB, parse_bytes


@pytest.fixture
def source() -> ModelSource:
    return resolve_model(KLEIN_4B, offline=True)


@pytest.fixture
def request_(source: ModelSource) -> Request:
    return make_request(source.spec, ("x",))


def test_a_named_profile_is_taken_as_it_is() -> None:
    found = resolve_machine("rtx-3060-12gb", "auto")
    assert (found.hardware, found.profile, found.detected) == (machine("rtx-3060-12gb"), "rtx-3060-12gb", False)


def test_max_ram_replaces_the_ram_that_a_profile_assumes() -> None:
    for size in (8 * GIB, 100 * GIB):
        hardware = resolve_machine("rtx-3060-12gb", "auto", size).hardware
        assert limits_of(hardware, Selection(max_ram_bytes=size)).ram_bytes == size
        assert hardware.pinnable_bytes / hardware.ram_bytes == pytest.approx(0.5, rel=0.01)
        assert hardware.provenance["ram_bytes"].startswith("--max-ram")


def test_a_profile_file_is_remembered_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((profiles_dir() / "rtx-3060-12gb.toml").read_text())
    found = resolve_machine(str(path), "auto")
    assert (found.profile, found.argument) == ("rtx-3060-12gb", str(path))


def test_a_device_that_contradicts_the_profile_is_refused() -> None:
    with pytest.raises(UsageError, match="--device cpu contradicts --profile rtx-3060-12gb, which is a cuda profile"):
        resolve_machine("rtx-3060-12gb", "cpu")
    with pytest.raises(UsageError, match="which is a cpu profile"):
        resolve_machine("cpu", "cuda")
    assert resolve_machine("rtx-3060-12gb", "cuda:1").hardware.device == "cuda"


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match="unknown profile 'rtx-3060'"):
        resolve_machine("rtx-3060", "auto")


def test_auto_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "detect", lambda device: machine("rtx-4090-24gb"))
    found = resolve_machine("auto", "auto", 8 * GIB)
    assert found == Machine(machine("rtx-4090-24gb"), "rtx-4090-24gb", detected=True, argument="auto")


def test_a_run_here_plans_within_the_ram_that_is_free_now(
    source: ModelSource, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available_ram_bytes", lambda: 5 * GIB)
    here = Machine(machine("rtx-3060-12gb"), "rtx-3060-12gb", detected=True)
    assert plan_job(source, here, request_, Selection(), running=True).limits.ram_bytes == 5 * GIB
    assert plan_job(source, here, request_, Selection()).limits.ram_bytes > 5 * GIB
    capped = Selection(max_ram_bytes=3 * GIB)
    assert plan_job(source, here, request_, capped, running=True).limits.ram_bytes == 3 * GIB


@pytest.mark.parametrize(("free_vram", "vram"), [(4 * GIB, 4 * GIB), (80 * GIB, None), (None, None)])
def test_a_run_with_a_named_profile_keeps_to_what_this_machine_has(
    source: ModelSource, request_: Request, monkeypatch: pytest.MonkeyPatch, free_vram: int | None, vram: int | None
) -> None:
    monkeypatch.setattr(job, "available_ram_bytes", lambda: 5 * GIB)
    monkeypatch.setattr(job, "free_vram_bytes", lambda device: free_vram if device == "cuda:1" else None)
    named = resolve_machine("rtx-4090-24gb", "cuda:1")
    plan = plan_job(source, named, request_, Selection(), running=True)
    assert plan.limits.ram_bytes == 5 * GIB >= plan.peak_ram_bytes
    assert plan.limits.vram_bytes == (vram or limits_of(named.hardware, Selection()).vram_bytes) >= plan.peak_vram_bytes
    elsewhere = plan_job(source, named, request_, Selection()).limits
    assert elsewhere == limits_of(named.hardware, Selection())


def test_a_run_is_not_offered_more_memory_than_is_free_here(
    source: ModelSource, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "available_ram_bytes", lambda: 800 * MIB)
    monkeypatch.setattr(job, "free_vram_bytes", lambda device: 3 * GIB)
    with pytest.raises(DoesNotFit) as caught:
        plan_job(source, resolve_machine("rtx-4090-24gb", "auto"), request_, Selection(), running=True)
    for command in caught.value.closest:
        words = shlex.split(command, comments=True)
        assert parse_bytes(words[words.index("--max-ram") + 1]) <= 800 * MIB
        assert parse_bytes(words[words.index("--max-vram") + 1]) <= 3 * GIB
    with pytest.raises(DoesNotFit) as caught:
        plan_job(source, resolve_machine("rtx-4090-24gb", "auto"), request_, Selection(max_ram_bytes=800 * MIB))
    assert caught.value.closest


def test_free_vram_is_that_of_the_card_that_is_meant() -> None:
    cards = [NvmlCard("a", "GPU-a", 8 * GIB, 5 * GIB, (8, 6), own_bytes=GIB), NvmlCard("b", "GPU-b", GIB, GIB, (8, 6))]
    assert free_vram_bytes("auto", cards) == free_vram_bytes("cuda", cards) == 6 * GIB
    assert free_vram_bytes("cuda:1", cards) == GIB
    assert free_vram_bytes("cuda:2", cards) is None
    assert free_vram_bytes("cuda", []) is None


def test_what_does_not_fit_comes_with_commands_for_the_same_machine(source: ModelSource, request_: Request) -> None:
    small = Selection(max_vram_bytes=GIB)
    found = resolve_machine(str(profiles_dir() / "rtx-3060-12gb.toml"), "auto")
    with pytest.raises(DoesNotFit) as caught:
        plan_job(source, found, request_, small)
    assert caught.value.closest
    assert all(f"--profile {found.argument}" in command for command in caught.value.closest)


def test_a_replay_is_checked(source: ModelSource, request_: Request) -> None:
    here = resolve_machine("rtx-3060-12gb", "auto")
    made = plan_job(source, here, request_, Selection())
    assert (made.guidance_scale, made.num_images_per_prompt) == (request_.guidance_scale, 1)
    assert replay(made, source, here, request_, Path("p.json")) == made
    with pytest.raises(PlanMismatch, match="guidance"):
        replay(made, source, here, replace(request_, guidance_scale=2.0), "the given plan")
    with pytest.raises(PlanMismatch, match=r"p\.json was made for something else"):
        replay(made, source, here, replace(request_, width=512), Path("p.json"))
    with pytest.raises(PlanMismatch, match="model"):
        replay(made, resolve_model(DEV, offline=True), here, request_, Path("p.json"))


def test_a_replay_here_counts_what_is_free_now(
    source: ModelSource, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(resolve_machine("rtx-3060-12gb", "auto"), detected=True)
    made = plan_job(source, here, request_, Selection())
    monkeypatch.setattr(job, "available_ram_bytes", lambda: made.peak_ram_bytes - 1)
    with pytest.raises(PlanMismatch, match="RAM: plan needs"):
        replay(made, source, here, request_, "p.json")
    assert replay(made, source, replace(here, detected=False), request_, "p.json") == made


def test_planning_imports_neither_torch_nor_the_model_libraries() -> None:
    code = (
        "import sys, lowmem_flux2.planning.job, lowmem_flux2.planning.explain;"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'huggingface_hub'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
