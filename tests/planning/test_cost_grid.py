"""Closed forms of memory within 3 % of the simulator: every pair of values that a plan may combine, in 40 cases.

``benchmarks/cost_accuracy.py`` does the same with some hundred random cases.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pairwise import all_pairs, missing_pairs

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from cost_cases import CHUNKS, FORMATS, MODELS, PLACEMENTS, TILES, Case, compare_case

TOLERANCE = 0.03
REFERENCE_TOKENS = 1024
"""Of one image of 512 px; a request may bring larger ones, which are but more tokens."""
FACTORS = {
    "tile": TILES,
    "weight_format": FORMATS,
    "model": MODELS,
    "size": ((512, 512), (1024, 1024), (2048, 1024), (2048, 2048), (624, 1520)),
    "references": tuple(count * REFERENCE_TOKENS for count in range(5)),
    "batch": (1, 2, 3, 4),
    "text": (16, 77, 512, 2048),
    "placement": PLACEMENTS,
    "chunk": CHUNKS,
    "dtype": ("bf16", "fp32"),
    "batches": (1, 2),
    "is_cut": (True, False),
    "slots": (2, 1),
    "steps": (2, 4),
    "device": ("cuda", "cpu"),
}
CASES = all_pairs(FACTORS)


def test_the_cases_hold_every_pair() -> None:
    assert len(CASES) == 40
    assert missing_pairs(CASES, FACTORS) == []


@pytest.mark.parametrize("number", range(len(CASES)))
def test_predicted_bytes_are_within_3_per_cent_of_the_simulated_ones(number: int) -> None:
    """Of each of its stages, the device's peak and every part of it, and the host's."""
    for each in compare_case(Case(**CASES[number])):
        for kind in ("resident", "slots", "activations", "device", "host"):
            predicted, simulated = getattr(each.predicted, kind), getattr(each.simulated, kind)
            assert predicted == pytest.approx(simulated, rel=TOLERANCE, abs=1 << 20), (each.stage, kind, CASES[number])


FOUND = (
    {"device": "cpu", "text": 2048, "weight_format": "nf4", "slots": 4},  # its last pass is a smaller one
    {"device": "cuda", "text": 77, "weight_format": "nf4-mixed", "slots": 1},  # whose layers have no planes
)
"""Encoding, which random cases found beyond the tolerance."""


@pytest.mark.parametrize("found", FOUND)
def test_what_random_cases_found(found: dict[str, Any]) -> None:
    rest = {"size": (1664, 1920), "batch": 3, "batches": 2, "references": 0, "steps": 8, "dtype": "bf16", "chunk": 0}
    rest |= {"model": "flux2-klein-base-9b", "tile": 128, "placement": "disk", "is_cut": True}
    encode = next(compare_case(Case(**rest, **found)))
    assert encode.stage == "encode"
    assert encode.predicted.device == pytest.approx(encode.simulated.device, rel=TOLERANCE / 3)
