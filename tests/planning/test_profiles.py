"""Shipped profiles are right, sourced and agree with the formulas they cite; a wrong one is told file, line, key."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lowmem_flux2.errors import ProfileError
from lowmem_flux2.planning.hardware import (
    check_profile,
    find_line,
    list_profiles,
    load_profile,
    profiles_dir,
    read_profile,
)

REQUIRED = {
    "rtx-2060-6gb",
    "rtx-2060-12gb",
    "rtx-2080-ti-11gb",
    "rtx-3050-8gb",
    "rtx-3060-12gb",
    "rtx-3060-laptop-6gb",
    "rtx-3070-8gb",
    "rtx-3080-10gb",
    "rtx-3090-24gb",
    "rtx-4050-laptop-6gb",
    "rtx-4060-8gb",
    "rtx-4060-laptop-8gb",
    "rtx-4060-ti-8gb",
    "rtx-4060-ti-16gb",
    "rtx-4070-12gb",
    "rtx-4070-ti-super-16gb",
    "rtx-4080-16gb",
    "rtx-4090-24gb",
    "rtx-4090-laptop-16gb",
    "rtx-5060-ti-16gb",
    "rtx-5070-12gb",
    "rtx-5070-ti-16gb",
    "rtx-5080-16gb",
    "rtx-5090-32gb",
    "a100-40gb",
    "a100-80gb",
    "h100-80gb",
    "l4-24gb",
    "cpu",
}
SHIPPED = (profiles_dir() / "rtx-3060-12gb.toml").read_text(encoding="utf-8")
TURING = (profiles_dir() / "rtx-2060-6gb.toml").read_text(encoding="utf-8")
FORMULA = re.compile(r"(?P<sms>\d+) SMs x (?P<ghz>[\d.]+) GHz x (?P<per_clock>\d+)")


def table(name: str) -> dict[str, Any]:
    return tomllib.loads((profiles_dir() / f"{name}.toml").read_text(encoding="utf-8"))


def test_the_required_profiles_ship() -> None:
    assert len(list_profiles()) >= 24
    assert set(list_profiles()) >= REQUIRED


@pytest.mark.parametrize("name", list_profiles())
def test_profile_is_right(name: str) -> None:
    found = check_profile(profiles_dir() / f"{name}.toml")
    assert found == load_profile(name)
    assert found.name == name  # the file is named after what it holds
    assert all(found.provenance.values())
    if found.device == "cuda":
        assert 0 < found.context_bytes < found.vram_reserve_bytes < found.vram_bytes
        assert 0 < found.pinnable_bytes < found.ram_bytes
        assert f"{math.ceil(found.vram_bytes / 2**30 - 0.001)}gb" in name.replace("l4-24gb", "l4-23gb")
    else:
        assert found.vram_bytes == found.vram_reserve_bytes == found.context_bytes == found.pinnable_bytes == 0


@pytest.mark.parametrize("name", list_profiles())
def test_every_number_has_a_source(name: str) -> None:
    content = table(name)
    numbers = {
        f"{header}.{key}"
        for header, body in content.items()
        if isinstance(body, dict) and header != "sources"
        for key in body
    } - {"gpu.nvml_names"}
    assert numbers == set(content["sources"])


@pytest.mark.parametrize("name", list_profiles())
def test_rates_follow_the_formula_in_their_source(name: str) -> None:
    content = table(name)
    for key, source in content["sources"].items():
        if key.startswith("matmul_tflops.") and (formula := FORMULA.match(source)):
            assert int(formula["sms"]) == content["gpu"]["sms"]
            assert float(formula["ghz"]) * 1000 == pytest.approx(content["gpu"]["boost_mhz"])
            peak = int(formula["sms"]) * float(formula["ghz"]) * int(formula["per_clock"]) / 1000
            assert content["matmul_tflops"][key.removeprefix("matmul_tflops.")] == pytest.approx(peak, rel=1e-3), key


@pytest.mark.parametrize("name", [name for name in list_profiles() if name.startswith("rtx-")])
def test_geforce_classes(name: str) -> None:
    content = table(name)
    rates, gpu = content["matmul_tflops"], content["gpu"]
    capability = tuple(int(part) for part in gpu["compute_capability"].split("."))
    tensor = gpu["sms"] * gpu["boost_mhz"] * 512 / 1e6  # fp32 accumulate
    assert rates["fp16"] == pytest.approx(tensor, rel=1e-3)
    assert rates["int8"] == pytest.approx(4 * tensor, rel=1e-3)
    assert ("bf16" in rates) == (capability >= (8, 0))
    assert ("fp8" in rates) == (capability >= (8, 9))
    assert rates.get("bf16", tensor) == pytest.approx(tensor, rel=1e-3)
    assert rates.get("fp8", 2 * tensor) == pytest.approx(2 * tensor, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "tflops"),
    [
        ("rtx-3090-24gb", "bf16", 71.2),  # GA102 white paper
        ("rtx-4090-24gb", "bf16", 165.2),  # Ada white paper
        ("rtx-4090-24gb", "fp8", 330.3),
        ("rtx-5090-32gb", "bf16", 209.5),  # RTX Blackwell white paper
        ("a100-80gb", "bf16", 312),
        ("h100-80gb", "bf16", 989.4),
    ],
)
def test_published_dense_rates(name: str, kind: str, tflops: float) -> None:
    assert table(name)["matmul_tflops"][kind] == pytest.approx(tflops, rel=5e-3)


def test_hardware_rates_are_peak_times_fraction() -> None:
    content = table("rtx-3060-12gb")
    found = load_profile("rtx-3060-12gb")
    share = content["compute"]["matmul_fraction"]
    assert found.matmul_flops_per_s["bf16"] == pytest.approx(28 * 1.777e9 * 512 * share, rel=1e-3)
    assert f"x {share:g} achievable" in found.provenance["matmul_flops_per_s.bf16"]


def test_nvml_name_and_vram_tell_the_cards_apart() -> None:
    cards = [read_profile(name) for name in list_profiles()]
    keys = [(name, card.hardware.vram_bytes) for card in cards for name in card.nvml_names]
    assert len(keys) == len(set(keys))


def test_laptop_and_x8_cards_have_half_the_link() -> None:
    full = load_profile("rtx-3060-12gb").h2d_pinned_bytes_per_s
    assert load_profile("rtx-4060-ti-16gb").h2d_pinned_bytes_per_s == full / 2
    assert load_profile("rtx-3060-laptop-6gb").h2d_pinned_bytes_per_s == full / 2
    assert load_profile("rtx-5060-ti-16gb").h2d_pinned_bytes_per_s == full
    assert load_profile("rtx-5090-32gb").h2d_pinned_bytes_per_s == 2 * full


# --- a wrong profile ---


def edited(tmp_path: Path, old: str, new: str, text: str = SHIPPED) -> tuple[Path, int]:
    """The profile with one line changed, and the number of that line."""
    assert text.count(old) == 1, old
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path, text[: text.index(old)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "key", "says"),
    [
        ('vram = "12 GiB"', 'vram = "12"', "gpu.vram", "not a size with a unit"),
        ('vram = "12 GiB"', "vram = 12", "gpu.vram", "not a size with a unit"),
        ('vram = "12 GiB"', 'vram = "12 GHz"', "gpu.vram", "not a size with a unit"),
        ('vram = "12 GiB"', 'vram = "12 Gb"', "gpu.vram", "not a size with a unit"),
        ('vram = "12 GiB"', 'vram = "-12 GiB"', "gpu.vram", "not a size with a unit"),
        ('vram = "12 GiB"', 'vram = "0 GiB"', "gpu.vram", "greater than zero"),
        ('vram_reserve = "0.9 GiB"', 'vram_reserve = "12 GiB"', "gpu.vram_reserve", "not less than vram"),
        ('context = "0.45 GiB"', 'context = "1 GiB"', "gpu.context", "more than vram_reserve"),
        ('compute_capability = "8.6"', "compute_capability = 8.6", "gpu.compute_capability", 'write for example "8.6"'),
        ("sms = 28", 'sms = "28"', "gpu.sms", "integer"),
        ("bf16 = 25.48", "bf16 = 0", "matmul_tflops.bf16", "greater than 0"),
        ("bf16 = 25.48", "bf16 = -1.0", "matmul_tflops.bf16", "greater than 0"),
        ("bf16 = 25.48", "bf16 = nan", "matmul_tflops.bf16", "found nan"),
        ("bf16 = 25.48", "bf16 = 25.48e12", "matmul_tflops.bf16", "less than or equal to 10000"),
        ("matmul_fraction = 0.7", "matmul_fraction = 1.2", "compute.matmul_fraction", "less than or equal to 1"),
        ('h2d_pinned = "25 GB/s"', 'h2d_pinned = "25 GB"', "link.h2d_pinned", "not a rate with a unit"),
        ('h2d_pinned = "25 GB/s"', 'h2d_pinned = "200 Gb/s"', "link.h2d_pinned", "not a rate with a unit"),
        ('h2d_pinned = "25 GB/s"', 'h2d_pinned = "25 TB/s"', "link.h2d_pinned", "impossibly fast"),
        ('h2d_pageable = "9 GB/s"', 'h2d_pageable = "90 GB/s"', "link.h2d_pageable", "faster than h2d_pinned"),
        ('pinnable = "16 GiB"', 'pinnable = "33 GiB"', "host.pinnable", "more than ram"),
        ("schema_version = 1", "schema_version = 2", "schema_version", "found 2"),
        ('name = "rtx-3060-12gb"', 'name = "My Card"', "name", "found 'My Card'"),
        ("sms = 28", "sms = 28\nvram_resrve = 1", "gpu.vram_resrve", "did you mean vram_reserve"),
        ("sms = 28", 'sms = 28\npinnable = "1 GiB"', "gpu.pinnable", "belongs in [host]"),
        ('"disk.read" = "', '"disk.raed" = "x"\n"disk.read" = "', "sources.disk.raed", "did you mean disk.read"),
    ],
)
def test_error_names_file_line_and_key(tmp_path: Path, old: str, new: str, key: str, says: str) -> None:
    path, line = edited(tmp_path, old, new)
    if "\n" in new and not new.startswith('"'):
        line += 1
    with pytest.raises(ProfileError) as caught:
        check_profile(path)
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}:{line}: {key}: ")
    assert says in first


@pytest.mark.parametrize(
    ("old", "header", "key"),
    [("sms = 28\n", "[gpu]", "gpu.sms"), ('read = "3.5 GB/s"\n', "[disk]", "disk.read"), ("fp32 = 12.74\n", None, "")],
)
def test_missing_key_points_at_its_table(tmp_path: Path, old: str, header: str | None, key: str) -> None:
    path, _ = edited(tmp_path, old, "")
    header, key = header or "[matmul_tflops]", key or "matmul_tflops.fp32"
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(header))
    with pytest.raises(ProfileError, match="missing") as caught:
        check_profile(path)
    assert str(caught.value).startswith(f"{path}:{line}: {key}: missing")


def test_gpu_needs_pinnable_and_a_gpu_table(tmp_path: Path) -> None:
    path, _ = edited(tmp_path, 'pinnable = "16 GiB"\n', "")
    with pytest.raises(ProfileError, match=r"host\.pinnable: missing"):
        check_profile(path)
    path, line = edited(tmp_path, 'device = "cuda"', 'device = "cpu"')
    with pytest.raises(ProfileError, match=rf':{line}: device: "cpu" has no \[gpu\] table'):
        check_profile(path)


def test_number_without_source_points_at_the_number(tmp_path: Path) -> None:
    path, _ = edited(tmp_path, '"matmul_tflops.int8" = "28 SMs x 1.777 GHz x 2048 OP"\n', "")
    line = find_line(path.read_text(), "matmul_tflops.int8")
    with pytest.raises(ProfileError) as caught:
        check_profile(path)
    assert f"{path}:{line}: matmul_tflops.int8: no source" in str(caught.value)


@pytest.mark.parametrize(("kind", "needs", "text"), [("bf16", "8.0", TURING), ("fp8", "8.9", SHIPPED)])
def test_class_that_the_card_lacks(tmp_path: Path, kind: str, needs: str, text: str) -> None:
    number = text[: text.index("[matmul_tflops]")].count("\n") + 2
    path, _ = edited(tmp_path, "\nfp32 = ", f"\n{kind} = 9.0\nfp32 = ", text)
    with pytest.raises(ProfileError) as caught:
        check_profile(path)
    assert f"{path}:{number}: matmul_tflops.{kind}: compute capability" in str(caught.value)
    assert f"({needs} or later)" in str(caught.value)


def test_every_error_is_listed_in_line_order(tmp_path: Path) -> None:
    path, _ = edited(tmp_path, "sms = 28", "sms = 0\nvramm = 3")
    path.write_text(path.read_text().replace('read = "3.5 GB/s"', 'read = "fast"'))
    with pytest.raises(ProfileError) as caught:
        check_profile(path)
    lines = [int(line.split(":")[1]) for line in str(caught.value).splitlines()]
    assert len(lines) == 3
    assert lines == sorted(lines)


def test_toml_syntax_error_names_the_line(tmp_path: Path) -> None:
    path, line = edited(tmp_path, "sms = 28", "sms = = 28")
    with pytest.raises(ProfileError, match="not TOML") as caught:
        check_profile(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    path.write_text('name = """open')
    with pytest.raises(ProfileError, match=r":1: not TOML"):
        check_profile(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProfileError, match="cannot read the profile"):
        load_profile(str(path))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ProfileError, match="did you mean rtx-4060-ti-8gb"):
        load_profile("rtx-4060ti-8gb")
    with pytest.raises(ProfileError, match="profiles list"):
        load_profile("zzz")


def test_profile_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SHIPPED)
    assert load_profile(str(path)) == load_profile("rtx-3060-12gb")
    assert path.read_text() == SHIPPED


def test_a_file_named_like_a_profile_does_not_shadow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rtx-3060-12gb").write_text("not a profile")
    found = read_profile("rtx-3060-12gb")
    assert found.path == profiles_dir() / "rtx-3060-12gb.toml"
    with pytest.raises(ProfileError, match="not TOML"):
        read_profile("./rtx-3060-12gb")
    Path("mine.toml").write_text(SHIPPED)
    assert read_profile("mine.toml").path == Path("mine.toml")
