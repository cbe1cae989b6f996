"""The formats' figures are those of the committed result files, and the planner's order follows from them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
import figures as tool

from lowmem_flux2.planning.fidelity_figures import FIGURES
from lowmem_flux2.planning.formats import FORMATS


def test_figures_are_those_of_the_result_files() -> None:
    """Else run tools/figures.py, and tools/plans.py after it."""
    assert tool.measured() == FIGURES


def test_the_table_is_as_it_would_be_written() -> None:
    text = tool.TARGET.read_text(encoding="utf-8")
    assert tool.rewritten(text, tool.measured()) == text


def test_every_quantized_format_is_measured_and_ordered_by_it() -> None:
    quantized = [fmt for fmt in FORMATS.values() if fmt.is_prepared]
    assert {fmt.name for fmt in quantized} == set(FIGURES)
    assert all(fmt.weight_error == FIGURES[fmt.name].gaussian for fmt in quantized)
    assert all(tool.WEIGHT_ERRORS in fmt.provenance and fmt.figures == FIGURES[fmt.name] for fmt in quantized)
    assert all(fmt.figures is None for fmt in FORMATS.values() if not fmt.is_quantized)
    order = sorted(quantized, key=lambda fmt: fmt.weight_error)
    assert [fmt.name for fmt in order] == ["int8", "w8a8", "int6", "fp8", "nf4", "int4", "nf4-mixed"]
    assert all(found.heavy_tailed >= 0.9 * found.gaussian > 0 for found in FIGURES.values())
