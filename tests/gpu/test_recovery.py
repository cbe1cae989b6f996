"""A real out of memory under a real cap, at klein-4b's full size: the run goes on to the same latents."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import recovery
from gpu.running import Bench

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", ["denoise", "encode", "decode"])
def test_the_run_goes_on(stage: str, tmp_path: Path) -> None:
    bench = Bench(device="cuda", tiny=False, profile="auto", scratch=tmp_path, out=tmp_path)
    (case,) = [case for case in recovery.cases(bench) if case.name.endswith(stage)]
    result = case.run(bench)
    assert result["ran_out"] >= 1, result["line"]
    assert result["bit_equal_latents"], result["line"]
    assert result["met"]
