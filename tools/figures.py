"""Write the measured figures of the weight formats into planning/fidelity_figures.py: python tools/figures.py

From benchmarks/results/weight-errors.json (benchmarks/weight_errors.py) and, where it is, fidelity-shapes.json
(benchmarks/fidelity.py). The planner's order of formats follows from them, so the README's plans may change:
python tools/plans.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from lowmem_flux2.planning.fidelity_figures import PICTURES, WEIGHT_ERRORS, FidelityFigures

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "lowmem_flux2" / "planning" / "fidelity_figures.py"
BEGIN = "FIGURES: dict[str, FidelityFigures] = {\n"


def measured(root: Path = ROOT) -> dict[str, FidelityFigures]:
    """The figures of each format that the result files hold, rounded: errors to 4 digits, decibels to 2."""
    errors = _results(root / WEIGHT_ERRORS)
    pictures = {row["name"]: row for row in _results(root / PICTURES)} if (root / PICTURES).exists() else {}
    return {name: _figures(name, errors, pictures) for name in dict.fromkeys(row["weight_format"] for row in errors)}


def _results(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    return found


def _figures(name: str, errors: list[dict[str, Any]], pictures: dict[str, dict[str, Any]]) -> FidelityFigures:
    gaussian, heavy = (
        round(
            median(row["result_error"] for row in errors if (row["weight_format"], row["weights"]) == (name, kind)), 4
        )
        for kind in ("gaussian", "heavy-tailed")
    )
    row = pictures.get(f"transformer {name}", {})
    decibels = (row.get(f"psnr_db_{which}") for which in ("median", "worst"))
    return FidelityFigures(gaussian, heavy, *(None if value is None else round(value, 2) for value in decibels))


def rewritten(text: str, figures: dict[str, FidelityFigures]) -> str:
    """The module with its table written anew."""
    before, _, _ = text.partition(BEGIN)
    lines = []
    for name, found in figures.items():
        numbers = (found.gaussian, found.heavy_tailed, found.psnr_db_median, found.psnr_db_worst)
        lines.append(f'    "{name}": FidelityFigures({", ".join(map(repr, numbers))}),\n')
    return f"{before}{BEGIN}{''.join(lines)}}}\n"


def write() -> None:
    """Write the module's table anew."""
    TARGET.write_text(rewritten(TARGET.read_text(encoding="utf-8"), measured()), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
