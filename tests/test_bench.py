"""The bench: each plan in a process of its own, JSON and plot written, failures recorded."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from lowmem_flux2 import bench
from lowmem_flux2.errors import RunError
from lowmem_flux2.planning.hardware import Hardware, load_profile


def _two(_: Hardware) -> list[tuple[str, tuple[str, ...]]]:
    return [
        ("fp32 resident", ("--dtype", "fp32", "--placement", "resident")),
        ("fp32 disk", ("--dtype", "fp32", "--placement", "disk")),
    ]


def test_bench_compares_plans_and_writes_json_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "variants", _two)
    console = Console(file=io.StringIO(), width=160)
    bench.run_bench("shapes", "a red circle in the center on a blue background", 2, tmp_path / "out", console)
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    resident, disk = record["results"]
    assert resident["failure"] is None
    assert disk["failure"] is None
    assert resident["pixels_sha256"] == disk["pixels_sha256"]
    assert min(resident["step_s"], disk["step_s"], resident["measured_peak_bytes"]) > 0
    with Image.open(tmp_path / "out" / "bench.png") as picture:
        assert picture.width > 400


def test_bench_records_a_plan_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "variants", lambda _: [("fp32 resident", ("--max-ram", "1MiB"))])
    console = Console(file=io.StringIO(), width=160)
    with pytest.raises(RunError, match="does not fit"):
        bench.run_bench("shapes", "x", 1, tmp_path, console)
    assert "does not fit" in json.loads((tmp_path / "bench.json").read_text())["results"][0]["failure"]


@pytest.mark.parametrize(
    ("profile", "expected"), [("rtx-2060-6gb", "fp16"), ("rtx-4090-24gb", "bf16"), ("cpu", "fp32")]
)
def test_variants_use_dtypes_that_the_device_has(profile: str, expected: str) -> None:
    names = [name.split()[0] for name, _ in bench.variants(load_profile(profile))]
    assert expected in names
    assert ("bf16" in names) == ("bf16" in load_profile(profile).matmul_flops_per_s)
