"""FLUX.2 klein KV: references are computed in the first step alone, bit-equal to the stock pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from command_line import runner
from test_chunking import chunked
from test_references import IMAGES, picture, seeded

from lowmem_flux2 import Engine
from lowmem_flux2.errors import Interrupted
from lowmem_flux2.planning.plan import Placement, Plan
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.reference_keys import Blended

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from cost_cases import Case, compare_case

STEPS = 3
ASKED: dict[str, Any] = {
    "prompt": "a red circle on a white background",
    "height": 64,
    "width": 96,
    "num_inference_steps": STEPS,
    "max_sequence_length": 64,
    "output_type": "latent",
}
SEVERAL = IMAGES["several of different sizes"]


@pytest.fixture(scope="module")
def kv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_klein(tmp_path_factory.mktemp("tiny") / "klein-kv", pipeline="Flux2KleinKVPipeline")


@pytest.fixture(scope="module")
def unbroken(kv: Path) -> torch.Tensor:
    return edited(kv)


def edited(folder: Path, plan: Plan | None = None, **options: Any) -> torch.Tensor:
    with Engine(str(folder), dtype="fp32", **options) as engine:
        return engine.generate(image=SEVERAL, **ASKED, seed=3, plan=plan).images


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("images", [1, 2])
def test_latents_equal_the_stock_pipelines(images: int, dtype: str, kv: Path) -> None:
    stock = tiny.load_stock(kv, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], align=True)
    asked = {**ASKED, "num_images_per_prompt": images}
    with Engine(str(kv), dtype=dtype) as engine:
        for image in (SEVERAL, None):
            made = engine.generate(image=image, **asked, generator=seeded(1, 2)[:images]).images
            expected = stock(image=image, **asked, generator=seeded(1, 2)[:images]).images
            assert torch.equal(made, expected)


def test_references_are_not_those_of_the_plain_model(kv: Path, tiny_klein_distilled: Path) -> None:
    assert not torch.equal(edited(kv), edited(tiny_klein_distilled))


@pytest.mark.parametrize("placements", [None, tuple(Placement)])
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_streamed_and_in_chunks_it_is_the_same(
    weight_format: str, placements: tuple[Placement, ...] | None, kv: Path
) -> None:
    with Engine(str(kv), dtype="fp32", weight_format=weight_format) as engine:
        asked = {**ASKED, "num_images_per_prompt": 2, "image": SEVERAL, "seed": 3}
        expected = engine.generate(**asked)
        made = engine.generate(**asked, plan=chunked(expected.report.plan, placements))
    assert made.report.plan.stage("denoise").chunk_tokens
    assert torch.equal(expected.images, made.images)


@pytest.mark.parametrize("call", range(STEPS))
def test_out_of_memory_computes_references_once_more(
    call: int, kv: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, predict = [], Forward.predict

    def failing(self: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["keys"].are_there)
        if len(calls) == call + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Forward, "predict", failing)
    assert torch.equal(edited(kv), unbroken)
    assert len(calls) == STEPS + 1 + (call > 0)
    assert calls.count(False) == 2


def test_an_interrupted_run_goes_on(kv: Path, unbroken: torch.Tensor) -> None:
    interruption = Interruption()
    with Engine(str(kv), dtype="fp32") as engine:
        with pytest.raises(Interrupted) as stopped:
            engine.generate(
                image=SEVERAL,
                **ASKED,
                seed=3,
                callback_on_step_end=lambda *_: interruption.ask(),
                interruption=interruption,
            )
        made = engine.resume(stopped.value.run, output_type="latent").images
    assert torch.equal(made, unbroken)


@pytest.mark.parametrize("cache", ["taylor:interval=2,warmup=1", "first-block:threshold=1,warmup=1"])
def test_step_caches_keep_nothing_of_references(cache: str, kv: Path) -> None:
    sigmas = [1 - step / 1000 for step in range(6)]  # so near that little changes
    asked = {**ASKED, "num_inference_steps": 6, "sigmas": sigmas, "image": SEVERAL, "seed": 3}
    with Engine(str(kv), dtype="fp32", step_cache=cache) as engine:
        made = engine.generate(**asked)
    (denoise,) = [stage for stage in made.report.stages if stage.stage == "denoise"]
    assert any(denoise.skipped_steps)
    assert torch.isfinite(made.images).all()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(
    ("chunk", "weight_format", "batch"), [(0, "plain", 1), (0, "int8", 2), (2048, "nf4", 1), (4096, "plain", 2)]
)
def test_predicted_bytes_are_within_3_per_cent_of_the_simulated_ones(
    chunk: int, weight_format: str, batch: int, device: str
) -> None:
    case = Case(
        model="flux2-klein-9b-kv",
        size=(1024, 768),
        batch=batch,
        batches=1,
        references=2 * 1024,
        text=512,
        steps=4,
        weight_format=weight_format,
        dtype="bf16",
        chunk=chunk,
        tile=512,
        placement="pinned",
        slots=2,
        is_cut=True,
        device=device,
    )
    (found,) = [each for each in compare_case(case) if each.stage == "denoise"]
    for kind in ("activations", "device", "host"):
        predicted, simulated = getattr(found.predicted, kind), getattr(found.simulated, kind)
        assert predicted == pytest.approx(simulated, rel=0.03, abs=1 << 20), kind


def test_blended_modulations() -> None:
    own, rest = torch.zeros(2, 3), torch.ones(2, 3)
    blended = Blended(own, rest, 2, 5)
    for first in range(7):
        for last in range(first + 1, 8):
            rows = blended.rows(first, last).expand(-1, last - first, -1)[0, :, 0]
            assert rows.tolist() == [float(2 <= at < 5) for at in range(first, last)]


def test_the_command_line_edits_with_it(
    kv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    picture(80, 64).save(tmp_path / "a.png")
    command = ["generate", "-m", str(kv), "--image", str(tmp_path / "a.png"), "-p", "a cat", "--steps", "2"]
    shown = run(*command, "-W", "64", "-H", "64", "--dry-run")
    assert "keeps their keys and values" in " ".join(shown.out.split())
    made = run(*command, "-W", "64", "-H", "64", "-o", str(tmp_path / "made.png"))
    assert (made.code, (tmp_path / "made.png").is_file()) == (0, True), made.err
