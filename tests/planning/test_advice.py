"""What is offered when nothing fits: commands which, parsed and planned, do fit."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import loras
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE, machine, spec
from typer.testing import CliRunner

from lowmem_flux2.cli import app
from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.advice import MOST, closest_fits
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import Selection, make_plan
from lowmem_flux2.planning.selection import with_ram_for
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.units import MIB, parse_bytes


def planned(command: str) -> Plan:
    """The plan of a ``lowmem-flux2 plan`` command, by the command line itself."""
    words = shlex.split(command, comments=True)
    assert words[:2] == ["lowmem-flux2", "plan"]
    ran = CliRunner().invoke(app, [*words[1:], "--json"])
    if ran.exception is not None:
        raise ran.exception
    return Plan.from_json(json.loads(ran.stdout), command)


CASES = [
    (DEV, "rtx-2060-6gb", "--max-ram 512MiB"),
    (DEV, "rtx-2060-6gb", "--max-vram 2GiB"),
    (DEV, "rtx-2060-6gb", "--max-vram 700MiB"),
    (DEV, "rtx-4090-24gb", "--max-vram 1500MiB --max-ram 900MiB"),
    (DEV, "rtx-2060-6gb", "-W 4096 -H 4096"),
    (KLEIN_9B, "rtx-4090-24gb", "--max-vram 1GiB --num-images 3 --steps 9"),
    (KLEIN_4B, "rtx-3060-12gb", "--max-vram 900MiB -W 512 -H 768"),
    (KLEIN_BASE, "rtx-3060-12gb", "--max-vram 1GiB --guidance 1 --max-sequence-length 256 --prefer speed"),
    (KLEIN_9B, "rtx-3050-8gb", "-W 432 -H 1168 --max-vram 614MiB --max-ram 1GiB --weight-format fp8"),  # both are short
    # Made smaller, this picture is cropped to 9:1, which would be refused as it is.
    (KLEIN_9B, "rtx-4060-ti-16gb", "-W 1632 -H 1920 --max-vram 1280MiB --max-ram 3GiB --image 112x896"),
    (KLEIN_4B, "cpu", "--max-ram 900MiB"),
    (DEV, "cpu", "--max-ram 600MiB --dtype fp32"),
    (DEV, "rtx-3060-12gb", "--max-vram 2GiB --image 1024x1024 --image 640x480 --step-cache taylor:interval=2"),
    (DEV, "rtx-2060-6gb", "--max-ram 1GiB --caption-upsample 0.15 --image 1024x768 -W 512 -H 512"),
    (
        KLEIN_BASE,
        "rtx-4060-8gb",
        "--max-vram 1GiB --num-images 4 --batch-size 4 --step-cache first-block:threshold=0.1",
    ),
]


@pytest.mark.parametrize(("model", "profile", "flags"), CASES)
def test_every_command_that_is_offered_fits(model: str, profile: str, flags: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {model} --profile {profile} {flags}")
    closest = caught.value.closest
    assert 1 <= len(closest) <= MOST
    assert len(set(closest)) == len(closest)
    for command in closest:
        plan = planned(command)
        assert f"{plan.peak_ram_bytes / (1 << 30):.2f} GiB RAM" in command or "MiB RAM" in command
        assert ("not in this version" in command) == bool(plan.not_executable)
        assert all(part in str(caught.value) for part in command.split("   # "))


@settings(deadline=None, max_examples=12)
@given(
    st.sampled_from([DEV, KLEIN_9B, KLEIN_4B, KLEIN_BASE]),
    st.sampled_from(["rtx-2060-6gb", "rtx-3060-12gb", "rtx-4090-24gb"]),
    st.sampled_from(["--max-vram", "--max-ram"]),
    st.integers(600, 1500),
    st.lists(
        st.sampled_from(
            [
                "--image 1024x1024",
                "--image 640x480",
                "-W 2048 -H 1024",
                "--num-images 4",
                "--batch-size 2",
                "--step-cache taylor:interval=2",
                "--prefer speed",
                "--vae-tile 512",
                "--text-weight-format int8",
            ]
        ),
        max_size=3,
        unique_by=lambda flag: flag.split()[0],
    ),
)
def test_pasted_each_of_them_plans(model: str, profile: str, cap: str, mib: int, more: list[str]) -> None:
    try:
        planned(f"lowmem-flux2 plan -m {model} --profile {profile} {cap} {mib}MiB {' '.join(more)}")
    except DoesNotFit as error:
        assert error.closest
        for command in error.closest:
            assert not planned(command).not_executable


def test_of_each_kind_of_change_only_the_smallest_is_offered() -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {DEV} --profile rtx-3060-12gb --max-vram 2GiB --image 1024x1024")
    first, second, third = caught.value.closest
    assert "--max-vram 3GiB" in first
    assert f"-m {KLEIN_9B} " in second  # the largest of the smaller models
    assert f"-m {KLEIN_4B} " in third


def test_a_lora_is_in_what_is_offered(tmp_path: Path) -> None:
    """A file whose name the shell would take apart."""
    pair = ["transformer_blocks.0.attn.to_q"]
    made = loras.factors(spec(DEV).transformer, pair, rank=1)
    lora = loras.write(tmp_path / "my lora.safetensors", loras.diffusers_keys(made))
    quoted = shlex.quote(f"{lora}:0.5")
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {DEV} --profile rtx-3060-12gb --max-vram 1GiB --lora {quoted}")
    assert caught.value.closest
    for command in caught.value.closest:
        plan = planned(command)
        assert plan.model != DEV or [adapter.scale for adapter in plan.workload.adapters] == [0.5]


def test_too_little_ram_for_dev_is_named_with_what_would_fit() -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {DEV} --profile rtx-2060-6gb --max-ram 512MiB")
    error = caught.value
    assert (error.resource, error.available_bytes, error.exit_code) == ("ram", 512 * MIB, 3)
    assert error.needed_bytes > error.available_bytes
    assert "--max-ram" in error.closest[0]


def test_a_fixed_choice_is_the_first_thing_to_give_up() -> None:
    model, hardware = spec(DEV), machine("rtx-3060-12gb")
    workload = workload_of(make_request(model, ("x",)), model)
    selection = Selection(placement="resident", weight_format="bf16")
    closest = closest_fits(model, workload, hardware, selection, "rtx-3060-12gb")
    asked = "lowmem-flux2 plan -m flux2-dev --profile rtx-3060-12gb"
    assert closest[0].startswith(f"{asked} --weight-format bf16   #")  # placed otherwise, bf16 fits


def test_on_this_very_machine_no_ram_or_vram_is_offered_that_it_lacks() -> None:
    model, hardware = spec(DEV), machine("rtx-2060-6gb")
    workload = workload_of(make_request(model, ("x",)), model)
    selection = Selection(max_vram_bytes=2 << 30, max_ram_bytes=900 << 20)
    closest = closest_fits(model, workload, hardware, selection, "auto")
    assert closest
    for command in closest:
        words = shlex.split(command, comments=True)
        assert words[words.index("--profile") + 1] == "auto"
        assert parse_bytes(words[words.index("--max-vram") + 1]) < hardware.vram_bytes
        assert parse_bytes(words[words.index("--max-ram") + 1]) < hardware.ram_bytes


def test_what_this_version_can_run_is_offered_first() -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {DEV} --profile rtx-2060-6gb --max-ram 512MiB")
    later = ["not in this version" in command for command in caught.value.closest]
    assert later == sorted(later)


def test_where_nothing_at_all_would_fit_nothing_is_offered() -> None:
    model = spec(DEV)
    workload = workload_of(make_request(model, ("x",)), model)
    hardware = machine("rtx-2060-6gb")
    crumb = Selection(max_vram_bytes=MIB, max_ram_bytes=MIB)
    nothing = replace(hardware, vram_bytes=hardware.vram_reserve_bytes + 1, ram_bytes=1 << 30)
    assert closest_fits(model, workload, nothing, crumb, "auto") == ()


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([DEV, KLEIN_9B, KLEIN_4B, KLEIN_BASE]),
    st.sampled_from(["rtx-2060-6gb", "rtx-4060-8gb", "rtx-4090-24gb", "cpu"]),
    st.integers(600, 6000),
    st.integers(700, 6000),
    st.sampled_from([256, 512, 1024, 4096]),
    st.sampled_from([1, 3, 300]),
    st.sampled_from([64, 512, 2048]),
    st.sampled_from(
        [{}, {}, {"weight_format": "bf16"}, {"placement": "resident"}, {"vae_tile": "off"}, {"dtype": "fp32"}]
    ),
    st.booleans(),
)
def test_something_is_offered_whenever_anything_at_all_fits(
    name: str,
    profile: str,
    vram_mib: int,
    ram_mib: int,
    px: int,
    images: int,
    tokens: int,
    fixed: dict[str, Any],
    is_this_machine: bool,
) -> None:
    """On a machine of any size, for any job; where the machine is this one, it cannot grow."""
    model = spec(name)
    request = make_request(model, ("x",), width=px, height=px, num_images_per_prompt=images, max_sequence_length=tokens)
    hardware = with_ram_for(machine(profile), ram_mib * MIB)
    if profile != "cpu":
        vram = vram_mib * MIB + hardware.vram_reserve_bytes - hardware.context_bytes
        hardware = replace(hardware, vram_bytes=vram)
    if (profile, fixed.get("weight_format")) == ("rtx-2060-6gb", "bf16"):
        fixed = {"weight_format": "fp16"}
    argument = "auto" if is_this_machine else profile
    selection = Selection(**fixed)
    workload = workload_of(request, model)
    try:
        make_plan(model, workload, hardware, selection, profile=profile)
        return
    except DoesNotFit:
        closest = closest_fits(model, workload, hardware, selection, argument)
    if not closest:
        assert not any(
            fits_somehow(hardware, other, side) for other in (KLEIN_4B, name) for side in (256, min(px, 256))
        )
    for command in closest:
        words = shlex.split(command, comments=True)
        assert words[:2] == ["lowmem-flux2", "plan"]


def fits_somehow(hardware: Hardware, name: str, px: int) -> bool:
    """One image, everything else left to the planner."""
    model = spec(name)
    try:
        request = make_request(model, ("x",), width=px, height=px)
        make_plan(model, workload_of(request, model), hardware, Selection(), profile="x")
    except DoesNotFit:
        return False
    return True


@pytest.mark.parametrize(("model", "profile", "flags"), CASES)
def test_no_two_commands_give_the_same_plan(model: str, profile: str, flags: str) -> None:
    with pytest.raises(DoesNotFit) as caught:
        planned(f"lowmem-flux2 plan -m {model} --profile {profile} {flags}")
    plans = [planned(command) for command in caught.value.closest]
    assert len({plan.digest for plan in plans}) == len(plans)
