"""No job leaves memory behind: two tiny models in turn, formats and placements too, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import memory_slope

JOBS = 26
"""Of the benchmark's 50: ten warm up, and 120 pairs are left for the median."""
LEFT_BYTES = 4 << 10
"""A page a job: less than any block of either model, and half of what tokenizers' cache of words once left behind."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_alternating_jobs_leave_nothing_behind(tiny_dev: Path, tiny_klein: Path, tmp_path: Path) -> None:
    figures = memory_slope.judged(memory_slope.measure(tmp_path, [tiny_dev, tiny_klein], JOBS))
    assert figures["anonymous_bytes_per_job"] < LEFT_BYTES
    assert len(figures["open_files"]) == len(figures["threads"]) == 1


def test_the_slope_is_that_of_most_pairs() -> None:
    assert memory_slope.theil_sen([5, 5, 5, 400, 5, 5]) == 0
    assert memory_slope.theil_sen([0, 10, 20, 9000, 40]) == 10
    assert memory_slope.kendall_tau([1, 2, 3]) == 1
    assert memory_slope.kendall_tau([1, 1, 1]) == 0
