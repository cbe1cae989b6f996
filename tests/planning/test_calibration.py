"""Calibrated profiles: written and read back, found for this very machine and no other, told in the plan."""

from __future__ import annotations

import dataclasses
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from machines import KLEIN_4B, plan_for, spec
from pydantic import TypeAdapter
from rich.console import Console

from lowmem_flux2.errors import ProfileError
from lowmem_flux2.planning.detect import Host, calibration_path, detect, identity_of
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.hardware import (
    ASSUMED,
    Hardware,
    check_profile,
    list_profiles,
    load_profile,
    profile_text,
    read_profile,
    value_of,
    with_value,
)
from lowmem_flux2.planning.identity import Identity, compute_threads, cpu_model, hashed_uuid
from lowmem_flux2.planning.nvml import NvmlCard
from lowmem_flux2.units import GIB, MIB

HOST = Host(48 * GIB, 24 * GIB, frozenset({"avx2"}), cpu="AMD EPYC", threads=8)
CARD = NvmlCard(
    "NVIDIA GeForce RTX 3060", "GPU-aaaa", 12288 * MIB, 11000 * MIB, (8, 6), pcie_generation=3, pcie_width=8
)
ON_CPU, ON_GPU = identity_of(None, HOST), identity_of(CARD, HOST)


def calibrated(name: str) -> Hardware:
    """A shipped profile, as if measured, each constant off by a factor of its own."""
    found = replace(load_profile(name), calibrated="2026-11-24")
    for number, field in enumerate(sorted(ASSUMED), start=1):
        found = with_value(found, field, value_of(found, field) * (1 + number / 7) + 1e-3, f"measured: {field}")
    return found


def save(hardware: Hardware, identity: Identity) -> Path:
    path = calibration_path(identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profile_text(hardware, "a machine", identity), encoding="utf-8")
    return path


# --- the file ---


@pytest.mark.parametrize("name", list_profiles())
def test_a_calibrated_file_gives_its_hardware_back(name: str, tmp_path: Path) -> None:
    """To four digits, sizes down to whole MiB, every number with its source."""
    written = calibrated(name)
    identity = ON_GPU if written.device == "cuda" else ON_CPU
    path = tmp_path / "my.toml"
    path.write_text(profile_text(written, 'a "quoted" machine', identity), encoding="utf-8")
    profile = read_profile(path)
    found = profile.hardware
    assert (profile.title, profile.identity) == ('a "quoted" machine', identity)
    assert (found.name, found.calibrated) == (name, "2026-11-24")
    on_a_gpu_only = {"cuda_host_bytes", "allocator_overhead_bytes"} if written.device == "cpu" else set()
    for field in {*written.provenance} - {"compute_capability"} - on_a_gpu_only:
        lost = MIB if field.endswith("_bytes") else 1e-3 * value_of(written, field)
        assert value_of(found, field) == pytest.approx(value_of(written, field), abs=lost), field
        assert found.provenance[field] == written.provenance[field] or value_of(written, field) == 0
    assert TypeAdapter(Hardware).validate_python(dataclasses.asdict(found)) == found


def test_a_file_without_the_new_keys_says_that_they_are_assumed(tmp_path: Path) -> None:
    text = read_profile("rtx-3060-12gb").path.read_text(encoding="utf-8")
    before, _, rest = text.partition("[memory]")
    lines = [line for line in f"{before}{rest[rest.index('[link]') :]}".splitlines() if "memory." not in line]
    (old := tmp_path / "old.toml").write_text("\n".join(lines), encoding="utf-8")
    for field, source in ASSUMED.items():
        assert load_profile(str(old)).provenance[field] == source
    assert load_profile("cpu").calibrated == ""
    assert load_profile("cpu").load_bytes_per_s == load_profile("cpu").disk_read_bytes_per_s


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('date = "2026-11-24"', 'date = "yesterday"', "calibration.date"),
        ("threads = 8", "threads = -1", "calibration.threads"),
        ("convolution_share = ", "convolution_share = -", "compute.convolution_share"),
        ('"compute.first_pass_ms" =', '"compute.first_pass_us" =', "no source"),
        ('libraries = "', 'libraries = "many', "host.libraries"),
        ("[calibration]", "[calibrated]", "calibrated"),
    ],
)
def test_what_is_wrong_in_a_calibration_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = profile_text(calibrated("cpu"), "a machine", ON_CPU)
    assert old in text
    path = tmp_path / "my.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ProfileError, match=rf"my.toml:\d+: .*{re.escape(says)}"):
        check_profile(path)


def test_only_a_calibration_may_leave_out_what_detection_derives_from(tmp_path: Path) -> None:
    text = profile_text(calibrated("rtx-3060-12gb"), "a machine", ON_GPU)
    path = tmp_path / "my.toml"
    path.write_text(re.sub(r"\[calibration\].*?\n\n", "", text, flags=re.S), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"gpu.sms: missing"):
        check_profile(path)


# --- found by auto ---


def test_auto_takes_the_calibration_of_this_cpu() -> None:
    save(calibrated("cpu"), ON_CPU)
    found = detect("cpu", cards=[], host=HOST)
    assert found.calibrated == "2026-11-24"
    assert found.convolution_share == pytest.approx(calibrated("cpu").convolution_share, rel=1e-3)
    assert (found.ram_bytes, found.pinnable_bytes) == (HOST.ram_bytes, 0)
    assert detect("cpu", cards=[], host=HOST, calibrated=False).calibrated == ""
    for other in (replace(HOST, threads=4), replace(HOST, cpu="Intel Xeon")):
        assert detect("cpu", cards=[], host=other).calibrated == ""
    assert detect("cuda", cards=[CARD], host=HOST).calibrated == ""


def test_auto_takes_the_calibration_of_this_gpu_and_what_is_free_now() -> None:
    save(calibrated("rtx-3060-12gb"), ON_GPU)
    found = detect(cards=[CARD], host=HOST)
    shipped = load_profile("rtx-3060-12gb")
    assert found.calibrated == "2026-11-24"
    assert found.h2d_pinned_bytes_per_s == shipped.h2d_pinned_bytes_per_s  # measured, whatever the slot says
    assert found.vram_bytes == CARD.total_bytes
    assert found.vram_reserve_bytes - found.context_bytes == CARD.total_bytes - CARD.free_bytes
    assert (found.ram_bytes, found.pinnable_bytes) == (HOST.ram_bytes, HOST.pinnable_bytes)
    assert detect(cards=[replace(CARD, uuid="GPU-bbbb")], host=HOST).calibrated == ""
    assert detect(cards=[CARD], host=replace(HOST, threads=1)).calibrated == "2026-11-24"


def test_a_calibration_that_is_broken_or_not_ours_is_refused_with_the_remedy() -> None:
    path = save(calibrated("cpu"), ON_CPU)
    path.write_text(path.read_text().replace("threads = 8", "threads = 6"), encoding="utf-8")
    with pytest.raises(ProfileError, match=r"AMD EPYC, 6 threads.*AMD EPYC, 8 threads.*calibrate --force"):
        detect("cpu", cards=[], host=HOST)
    path.write_text("nonsense", encoding="utf-8")
    with pytest.raises(ProfileError, match=r"not TOML.*calibrate --force"):
        detect("cpu", cards=[], host=HOST)
    assert detect("cpu", cards=[], host=HOST, calibrated=False).name == "cpu"


def test_the_plan_says_when_the_machine_was_calibrated() -> None:
    plan = plan_for(KLEIN_4B, "cpu", 64)
    told = replace(plan, hardware=replace(plan.hardware, calibrated="2026-11-24"))
    for shown, there in ((plan, False), (told, True)):
        console = Console(width=200, file=io.StringIO())
        console.print(explain(shown, spec(KLEIN_4B)))
        assert ("calibrated 2026-11-24" in console.file.getvalue()) is there


# --- which machine ---


def test_slugs_tell_machines_apart_and_name_no_uuid() -> None:
    machines = [ON_CPU, ON_GPU, replace(ON_CPU, threads=4), replace(ON_GPU, gpu_id=hashed_uuid("GPU-bbbb"))]
    assert len({one.slug for one in machines}) == len(machines)
    assert all(re.fullmatch(r"[a-z0-9-]+", one.slug) for one in machines)
    assert "aaaa" not in str(ON_GPU) + ON_GPU.slug


def test_threads_are_what_torch_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert compute_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "all")
    assert compute_threads() >= 1


def test_the_cpu_has_a_name(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9654\n")
    assert cpu_model(info) == "AMD EPYC 9654"
    assert cpu_model(tmp_path / "none")
