"""A card is calibrated: every measurement gives a number, of a possible size."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu


def test_a_card_is_measured(tmp_path: Path) -> None:
    from lowmem_flux2.calibrating import combined
    from lowmem_flux2.planning.detect import detect
    from lowmem_flux2.runtime.calibrate import Calibrator

    assumed = detect("cuda", calibrated=False)
    measured = Calibrator("cuda", assumed, tmp_path, 30).run()
    assert measured.failures == []
    found = combined(assumed, measured, "measured: ")
    assert all(
        found.provenance[f"matmul_flops_per_s.{kind}"].startswith("measured: ") for kind in found.matmul_flops_per_s
    )
    assert 100 << 20 < found.context_bytes < 2 << 30
    assert 0 < found.cuda_host_bytes < 8 << 30
    assert found.h2d_pageable_bytes_per_s <= found.h2d_pinned_bytes_per_s < 200e9
    for kind, rate in found.matmul_flops_per_s.items():
        assert 0.05 < rate / assumed.matmul_flops_per_s[kind] < 20, kind
