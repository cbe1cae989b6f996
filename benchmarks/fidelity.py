"""What each choice that changes pixels costs, on the trained `shapes` checkpoint: 64 pictures a variant.

    python benchmarks/fidelity.py --out benchmarks/results

Writes fidelity-shapes.json, .md and .png there, and the formats' figures in planning/fidelity_figures.py. `shapes` is
regression evidence and orders step caches and tiles; the order of weight formats for 32 B weights rests on weight
errors (benchmarks/weight_errors.py) and, where somebody has them, on real checkpoints:
`lowmem-flux2 bench --fidelity -m MODEL --prompt-file FILE` makes the same table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools" / "shapes"), str(ROOT / "tools")]

import figures  # noqa: E402
from draw import parse  # noqa: E402
from score import check, read_picture  # noqa: E402

from lowmem_flux2.fidelity import measure_fidelity, prompts_for  # noqa: E402
from lowmem_flux2.runtime.similarity import Pictures  # noqa: E402
from lowmem_flux2.variants import Setting  # noqa: E402

SEED = 500


def fit(pictures: Pictures, prompts: Sequence[str]) -> NDArray[np.float64]:
    """Overlap of each picture's shape with its ideal outline; 0 where its prompt is not what it shows."""
    readings = [read_picture(picture) for picture in pictures]
    pairs = zip(readings, prompts, strict=True)
    return np.array([reading.fit if check(reading, parse(prompt))["all"] else 0.0 for reading, prompt in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    prompts = prompts_for("shapes", None, arguments.images)
    setting = Setting("shapes", prompts, SEED, dtype="fp32", steps=0, width=0, height=0)
    measure_fidelity(setting, arguments.out, Console(), stem="fidelity-shapes", score=fit)
    if arguments.out.resolve() == figures.ROOT / "benchmarks" / "results":
        figures.write()


if __name__ == "__main__":
    main()
