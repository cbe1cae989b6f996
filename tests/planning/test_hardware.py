"""``Hardware`` round trips; detection with injected cards, hosts and cgroup trees."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning import detect as detection
from lowmem_flux2.planning.detect import Host, cgroup_memory, detect, pinnable_limit_bytes
from lowmem_flux2.planning.hardware import Hardware, list_profiles, load_profile
from lowmem_flux2.planning.nvml import NvmlCard, read_nvml, visible_cards
from lowmem_flux2.units import GIB, MIB

HOST = Host(ram_bytes=48 * GIB, pinnable_bytes=24 * GIB, cpu_flags=frozenset({"avx2"}))
CARD = NvmlCard("NVIDIA GeForce RTX 3060", "GPU-aaaa", 12288 * MIB, 11000 * MIB, (8, 6))


# --- the type ---


@pytest.mark.parametrize("name", list_profiles())
def test_round_trip(name: str) -> None:
    found = load_profile(name)
    adapter = TypeAdapter(Hardware)
    assert adapter.validate_python(dataclasses.asdict(found)) == found
    assert adapter.validate_python(json.loads(json.dumps(dataclasses.asdict(found)))) == found
    assert adapter.validate_json(adapter.dump_json(found)) == found


def test_importing_is_light() -> None:
    code = (
        "import sys, lowmem_flux2.planning.detect; sys.exit(any(m in sys.modules for m in ('torch','pynvml','psutil')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- detection ---


def test_known_card_gets_its_profile() -> None:
    found = detect(cards=[CARD], host=HOST)
    shipped = load_profile("rtx-3060-12gb")
    assert (found.name, found.device, found.matmul_flops_per_s) == (
        "rtx-3060-12gb",
        "cuda",
        shipped.matmul_flops_per_s,
    )
    assert found.vram_bytes == 12288 * MIB
    assert found.vram_reserve_bytes == shipped.context_bytes + 1288 * MIB
    assert (found.ram_bytes, found.pinnable_bytes) == (48 * GIB, 24 * GIB)
    assert found.h2d_pinned_bytes_per_s == shipped.h2d_pinned_bytes_per_s
    assert "NVML" in found.provenance["vram_bytes"]


def test_own_use_is_not_someone_elses() -> None:
    found = detect(cards=[dataclasses.replace(CARD, own_bytes=1000 * MIB)], host=HOST)
    assert found.vram_reserve_bytes == found.context_bytes + 288 * MIB


@pytest.mark.parametrize(
    ("name", "total_mib", "profile"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 8188, "rtx-4060-ti-8gb"),
        ("NVIDIA GeForce RTX 4060 Ti", 16380, "rtx-4060-ti-16gb"),
        ("GeForce RTX 2060", 6144, "rtx-2060-6gb"),  # drivers before 450 leave the vendor out
        ("NVIDIA GeForce RTX 5090", 32607, "rtx-5090-32gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA L4", 23034, "l4-24gb"),
    ],
)
def test_name_and_vram_pick_the_profile(name: str, total_mib: int, profile: str) -> None:
    card = NvmlCard(name, "GPU-b", total_mib * MIB, total_mib * MIB, load_profile(profile).compute_capability or (0, 0))
    assert detect("cuda", cards=[card], host=HOST).name == profile


def test_slower_slot_gives_a_slower_link() -> None:
    found = detect(cards=[dataclasses.replace(CARD, pcie_generation=3, pcie_width=8)], host=HOST)
    assert found.h2d_pinned_bytes_per_s == 6.25e9
    assert found.h2d_pageable_bytes_per_s == 2.5e9
    assert "PCIe 3 x8" in found.provenance["h2d_pinned_bytes_per_s"]


def test_unknown_card_is_derived_and_scaled_by_its_cores() -> None:
    card = NvmlCard("NVIDIA GeForce RTX 3080 Ti", "GPU-c", 12288 * MIB, 12000 * MIB, (8, 6), cuda_cores=80 * 128)
    found, near = detect(cards=[card], host=HOST), load_profile("rtx-3080-10gb")
    assert found.name == "rtx-3080-ti-12gb"
    assert found.vram_bytes == 12288 * MIB
    assert found.matmul_flops_per_s["bf16"] == pytest.approx(near.matmul_flops_per_s["bf16"] * 80 / 68)
    assert found.provenance["matmul_flops_per_s.bf16"].startswith("derived from rtx-3080-10gb, x 80 / 68 SMs")


@pytest.mark.parametrize(
    ("capability", "classes"),
    [
        ((6, 1), {"fp32"}),
        ((7, 0), {"fp32", "fp16"}),
        ((7, 5), {"fp32", "fp16", "int8"}),
        ((8, 7), {"fp32", "fp16", "bf16", "int8"}),
        ((10, 0), {"fp32", "fp16", "bf16", "fp8", "int8"}),
        ((13, 0), {"fp32", "fp16", "bf16", "fp8", "int8"}),
    ],
)
def test_derived_card_claims_no_class_that_it_lacks(capability: tuple[int, int], classes: set[str]) -> None:
    found = detect(cards=[NvmlCard("Some Card", "GPU-d", 16 * GIB, 16 * GIB, capability)], host=HOST)
    assert set(found.matmul_flops_per_s) == classes
    assert {key.rpartition(".")[2] for key in found.provenance if key.startswith("matmul_flops_per_s.")} == classes
    assert found.attention_flops_per_s <= max(found.matmul_flops_per_s.values())
    assert found.compute_capability == capability


@settings(deadline=None)  # the first example reads every profile
@given(
    total=st.integers(1 * GIB, 200 * GIB),
    free=st.integers(0, 200 * GIB),
    own=st.integers(0, 200 * GIB),
    capability=st.tuples(st.integers(5, 13), st.integers(0, 9)),
    name=st.sampled_from(["NVIDIA GeForce RTX 3060", "NVIDIA L4", "Quadro X", ""]),
    cores=st.none() | st.integers(64, 30_000),
)
def test_detected_hardware_is_possible(
    total: int, free: int, own: int, capability: tuple[int, int], name: str, cores: int | None
) -> None:
    found = detect(
        cards=[NvmlCard(name, "GPU-e", total, min(free, total), capability, own, cuda_cores=cores)], host=HOST
    )
    assert 0 <= found.context_bytes <= found.vram_reserve_bytes < found.vram_bytes == total
    assert 0 < found.pinnable_bytes <= found.ram_bytes
    assert all(rate > 0 for rate in found.matmul_flops_per_s.values())
    assert TypeAdapter(Hardware).validate_python(dataclasses.asdict(found)) == found


def test_without_a_gpu() -> None:
    found = detect("auto", cards=[], host=HOST)
    assert (found.name, found.device, found.ram_bytes, found.pinnable_bytes) == ("cpu", "cpu", 48 * GIB, 0)
    assert "bf16" not in found.matmul_flops_per_s
    assert "matmul_flops_per_s.bf16" not in found.provenance
    for flag in ("avx512_bf16", "amx_bf16"):
        fast = dataclasses.replace(HOST, cpu_flags=frozenset({flag}))
        found = detect("cpu", cards=[CARD], host=fast)
        assert "bf16" in found.matmul_flops_per_s
        assert found.convolution_copies == (2 if flag == "amx_bf16" else 1)
    with pytest.raises(UsageError, match=r"no NVIDIA GPU was found.*lowmem-flux2 doctor"):
        detect("cuda", cards=[], host=HOST)


def test_device_index() -> None:
    other = dataclasses.replace(CARD, name="NVIDIA L4", total_bytes=23034 * MIB, compute_capability=(8, 9))
    assert detect("cuda:1", cards=[CARD, other], host=HOST).name == "l4-24gb"
    with pytest.raises(UsageError, match=r"cuda:2 is not there \(cuda:0 .*3060, cuda:1 NVIDIA L4\)"):
        detect("cuda:2", cards=[CARD, other], host=HOST)
    for wrong in ("gpu", "cuda:", "cuda:-1", "CUDA", ""):
        with pytest.raises(UsageError, match="is not a device"):
            detect(wrong, cards=[CARD], host=HOST)


def test_visible_cards_as_cuda_reads_the_mask() -> None:
    one, two = CARD, dataclasses.replace(CARD, uuid="GPU-bbbb")
    assert visible_cards([one, two], None) == (one, two)
    assert visible_cards([one, two], "1,0") == (two, one)
    assert visible_cards([one, two], "GPU-bb") == (two,)
    assert visible_cards([one, two], "1,7,0") == (two,)
    assert visible_cards([one, two], "") == visible_cards([one, two], "-1") == ()
    with pytest.raises(UsageError, match="MIG"):
        visible_cards([one, two], "MIG-1")


class FakeNvmlError(Exception):
    pass


def fake_nvml(calls: list[str], **overrides: Any) -> SimpleNamespace:
    """The part of pynvml that ``read_nvml`` uses, with one card; ``calls`` records start and end."""

    def unsupported(handle: object) -> int:
        raise FakeNvmlError

    answers: dict[str, Any] = {
        "NVMLError": FakeNvmlError,
        "nvmlInit": lambda: calls.append("init"),
        "nvmlShutdown": lambda: calls.append("shutdown"),
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: b"NVIDIA L4",
        "nvmlDeviceGetUUID": lambda handle: "GPU-f",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=100, free=90),
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (8, 9),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=1, usedGpuMemory=None)],
        "nvmlDeviceGetNumGpuCores": lambda handle: 7424,
        "nvmlDeviceGetMaxPcieLinkGeneration": unsupported,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 0,
    }
    return SimpleNamespace(**answers | overrides)


def test_nvml_is_read_and_shut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(calls))  # type: ignore[arg-type]
    assert read_nvml() == (NvmlCard("NVIDIA L4", "GPU-f", 100, 90, (8, 9), 0, 7424, None, None),)
    assert calls == ["init", "shutdown"]


@pytest.mark.parametrize("failing", ["nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_failing_nvml_is_no_gpu(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> None:
        raise FakeNvmlError

    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(calls, **{failing: fail}))  # type: ignore[arg-type]
    assert read_nvml() == ()
    assert calls == ["init", "shutdown"]
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(calls, nvmlInit=fail))  # type: ignore[arg-type]
    assert read_nvml() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert read_nvml() == ()


# --- RAM ---


def cgroup(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_walks_up(tmp_path: Path) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("0::/user.slice/app.scope\n")
    cgroup(mount)
    stat = f"anon 5\ninactive_file {GIB}\n"
    cgroup(mount / "user.slice", memory__max=f"{8 * GIB}\n", memory__current=f"{3 * GIB}\n", memory__stat=stat)
    cgroup(mount / "user.slice/app.scope", memory__max="max\n", memory__current="5\n")
    (level,) = cgroup_memory(proc, mount)
    assert (level.limit_bytes, level.used_bytes, level.cache_bytes) == (8 * GIB, 3 * GIB, GIB)


def test_cgroup_v1_and_a_container_that_sees_its_hosts_path(tmp_path: Path) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("5:cpu,cpuacct:/\n4:memory:/docker/abc\n1:name=systemd:/x\n0::/\n")
    stat = "inactive_file 1\ntotal_inactive_file 77\n"
    cgroup(mount / "memory", memory__limit_in_bytes=f"{4 * GIB}", memory__usage_in_bytes=f"{GIB}", memory__stat=stat)
    (level,) = cgroup_memory(proc, mount)
    assert (level.limit_bytes, level.used_bytes, level.cache_bytes) == (4 * GIB, GIB, 77)
    cgroup(mount / "memory", memory__limit_in_bytes="9223372036854771712")
    assert cgroup_memory(proc, mount) == ()
    assert cgroup_memory(tmp_path / "none", mount) == ()


def test_ram_is_bounded_by_the_tightest_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = (detection.CgroupMemory(MIB * 64, MIB * 60, MIB * 10), detection.CgroupMemory(GIB, 0, 0))
    monkeypatch.setattr(detection, "cgroup_memory", lambda: levels)
    assert detection.ram_limit_bytes() == 64 * MIB
    assert detection.available_ram_bytes() == 14 * MIB
    monkeypatch.setattr(detection, "cgroup_memory", lambda: ())
    assert 0 < detection.available_ram_bytes() <= detection.ram_limit_bytes()


@pytest.mark.parametrize(
    ("limit_bytes", "root", "pinnable_bytes"),
    [
        (None, False, 16 * GIB),
        (8 * MIB, False, 16 * GIB),  # the kernel's and systemd's default says nothing about us
        (4 * GIB, False, 16 * GIB),  # an eighth of RAM, the default of distributions
        (6 * GIB, False, 6 * GIB),  # set on purpose
        (6 * GIB, True, 16 * GIB),
        (20 * GIB, False, 16 * GIB),
        (0, False, 0),  # nobody's default
        (0, True, 0),
    ],
)
def test_pinnable_ram(limit_bytes: int | None, root: bool, pinnable_bytes: int) -> None:
    assert pinnable_limit_bytes(32 * GIB, limit_bytes, root=root) == pinnable_bytes


def test_this_machine() -> None:
    host = detection.read_host()
    assert 0 < host.pinnable_bytes < host.ram_bytes
    assert detect("cpu").ram_bytes == host.ram_bytes
