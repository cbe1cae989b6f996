"""The fidelity bench: equal pictures are called equal, changed ones are priced, and a run that was cut off goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lowmem_flux2 import fidelity
from lowmem_flux2.errors import UsageError
from lowmem_flux2.fidelity import measure_fidelity, prompts_for, read_results
from lowmem_flux2.planning.step_caches import PRESETS
from lowmem_flux2.runtime.similarity import psnr_db, relative_error, ssim
from lowmem_flux2.variants import Setting, Variant, variants

PROMPTS = (
    "a large red circle in the center on a blue background",
    "a small green cross at the left on a white background",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures a variant, two steps, on the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("fidelity")
    setting = Setting("shapes", PROMPTS, 0, "fp32", steps=2, width=0, height=0)
    measure_fidelity(
        setting, folder, Console(quiet=True), score=lambda pictures, prompts: pictures.mean(axis=(1, 2, 3))
    )
    return folder


def test_every_choice_has_its_figures(measured: Path) -> None:
    found = {one.name: one for one in read_results(measured / "fidelity.json")}
    assert {"repeated", "compute in bf16", "transformer int8", "text encoder nf4", "another prompt"} <= set(found)
    assert found["repeated"].equal_images == 2
    assert found["repeated"].psnr_db_worst is None and found["repeated"].ssim_worst == 1.0
    assert found["repeated"].latents_error_worst == 0.0
    for name, one in found.items():
        if one.kind in ("weights", "text weights", "dtype", "tiles"):
            assert one.equal_images == 0, name
            assert one.psnr_db_worst is not None and one.psnr_db_median is not None
            assert one.psnr_db_worst <= one.psnr_db_median, name
    errors = [found[f"transformer {name}"].latents_error_median for name in ("int8", "fp8", "nf4")]
    assert errors == sorted(errors)
    controls = found["another prompt"].psnr_db_median, found["transformer int8"].psnr_db_median
    assert controls[0] is not None and controls[1] is not None and controls[0] < controls[1]
    assert all(one.score_mean is not None for one in found.values() if one.kind == "weights")


def test_table_and_contact_sheet_are_written(measured: Path) -> None:
    lines = (measured / "fidelity.md").read_text().splitlines()
    raw = json.loads((measured / "fidelity.json").read_text())
    assert len(lines) == 2 + len(raw["results"])
    assert {line.count("|") for line in lines} == {len(fidelity.HEADINGS) + 1}
    assert raw["setting"]["steps"] == 2 and raw["setting"]["width"] == 64
    with Image.open(measured / "fidelity.png") as sheet:
        assert sheet.width > 6 * 128


def test_what_is_kept_is_not_made_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_results(measured / "fidelity.json")
    monkeypatch.setattr(fidelity, "_make", lambda setting, variant: pytest.fail(f"{variant.name} was made again"))
    setting = Setting("shapes", PROMPTS, 0, "fp32", steps=2, width=0, height=0)
    again = measure_fidelity(setting, measured, Console(quiet=True))
    assert [one.psnr_db_median for one in again] == [one.psnr_db_median for one in before]


def test_step_caches_are_among_the_choices_where_they_skip_a_step() -> None:
    setting = Setting("shapes", PROMPTS, 0, "fp32", steps=20, width=64, height=64)
    caches = [one.step_cache for one in variants(setting, 64, 64) if one.kind == "step cache"]
    assert caches[0] == "first-block:threshold=0.0,order=1,warmup=3,last=1"
    assert {str(cache) for cache in PRESETS.values()} < set(caches)
    few = variants(replace(setting, steps=2), 64, 64)
    assert not [one for one in few if one.kind == "step cache"]


def test_skipped_steps_and_computed_blocks_are_recorded(tmp_path: Path) -> None:
    setting = Setting("shapes", PROMPTS, 0, "fp32", steps=6, width=64, height=64)
    variant = Variant("half", "step cache", step_cache="taylor:interval=2")
    made = fidelity._kept(setting, variant, tmp_path)
    assert made.skipped.tolist() == [[False, False, True, False, True, False]]
    figures = fidelity._compare(setting, variant, made, replace(made, computed_blocks=36), None, None)
    assert figures.skipped_steps == [[2, 4]]
    assert figures.blocks_ratio == pytest.approx(4 / 6)


def test_kept_pictures_are_those_that_were_made(tmp_path: Path) -> None:
    setting = Setting("shapes", PROMPTS, 0, "fp32", steps=1, width=64, height=64)
    made = fidelity._make(setting, Variant("reference", "reference"))
    kept = fidelity._kept(setting, Variant("reference", "reference"), tmp_path)
    assert np.abs(kept.pictures - made.pictures).max() <= 1 / 65535
    assert np.array_equal(kept.latents, made.latents)


def test_measures_follow_their_definitions() -> None:
    chance = np.random.default_rng(0)
    pictures = chance.random((2, 32, 32, 3), dtype=np.float32)
    shifted = (pictures + 0.1).astype(np.float32)
    assert psnr_db(shifted, pictures) == pytest.approx([20.0, 20.0], abs=1e-3)
    assert all(math.isinf(value) for value in psnr_db(pictures, pictures))
    assert ssim(pictures, pictures) == pytest.approx([1.0, 1.0])
    assert (ssim(chance.random((2, 32, 32, 3), dtype=np.float32), pictures) < 0.2).all()
    assert relative_error(1.1 * pictures, pictures) == pytest.approx([0.1, 0.1], rel=1e-3)


def test_prompts_come_in_turn_and_another_model_needs_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert prompts_for("flux2-dev", file, 5) == ("one", "two", "one", "two", "one")
    assert len(set(prompts_for("shapes", None, 64))) > 50
    with pytest.raises(UsageError, match="--prompt-file"):
        prompts_for("flux2-dev", None, 4)
