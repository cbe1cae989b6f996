"""What each weight format costs in fidelity, as measured. Written by ``python tools/figures.py``; do not edit.

From benchmarks/results/weight-errors.json and fidelity-shapes.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FidelityFigures:
    """Of one quantized format; tests compare them with the result files.

    Args:
        gaussian, heavy_tailed: relative error of a Linear's result with weights of these kinds at FLUX.2's widths, the
            median over widths and deviations (``WEIGHT_ERRORS``). For storage formats it is the weights' own.
        psnr_db_median, psnr_db_worst: of pictures of the trained ``shapes`` checkpoint with the transformer in this
            format, against unquantized weights (``PICTURES``); None where that was not measured. They are evidence of
            a tiny model, so they order nothing.
    """

    gaussian: float
    heavy_tailed: float
    psnr_db_median: float | None = None
    psnr_db_worst: float | None = None


WEIGHT_ERRORS = "benchmarks/results/weight-errors.json"
PICTURES = "benchmarks/results/fidelity-shapes.json"

FIGURES: dict[str, FidelityFigures] = {
    "int8": FidelityFigures(0.0095, 0.0215, 62.2, 54.32),
    "w8a8": FidelityFigures(0.0236, 0.0302, 58.36, 50.07),
    "int6": FidelityFigures(0.0259, 0.0343, 53.03, 38.81),
    "fp8": FidelityFigures(0.0331, 0.0339, 51.57, 37.7),
    "nf4": FidelityFigures(0.092, 0.105, 40.36, 32.57),
    "nf4-mixed": FidelityFigures(0.1029, 0.1225, 42.31, 32.95),
    "int4": FidelityFigures(0.1003, 0.1332, 40.13, 30.02),
}
