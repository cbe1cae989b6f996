"""The recovery ladder: out of memory at every stage and step, and the run goes on with the same pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.errors import RunError
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser
from lowmem_flux2.runtime.encode import TextEncoder

STEPS = 4
PROMPTS = ["a red circle", "a blue dog"]


class Failing:
    """Makes a method raise OutOfMemoryError at its n-th call (counted from 0), or at every call."""

    def __init__(self, method: Callable[..., Any], at: int | None) -> None:
        self._method, self._at = method, at
        self.calls = 0

    def patched(self) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if self._at is None or number == self._at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More details")
            return self._method(*args, **kwargs)

        return call


def run(folder: Path, **options: Any) -> Generation:
    with Engine(str(folder), dtype="fp32", **options) as engine:
        return engine.generate(
            PROMPTS,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            height=64,
            width=64,
            max_sequence_length=64,
            seed=5,
            output_type="pt",
        )


@pytest.fixture(scope="module")
def unbroken(tiny_klein: Path) -> torch.Tensor:
    return run(tiny_klein).images


@pytest.mark.parametrize("step", range(STEPS))
def test_denoise_goes_on_at_the_step_that_failed(
    step: int, tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(Denoiser._predict, step)
    monkeypatch.setattr(Denoiser, "_predict", failing.patched())
    result = run(tiny_klein)
    assert torch.equal(result.images, unbroken)
    assert failing.calls == STEPS + 1  # only the failed step was tried twice
    (event,) = result.report.events
    assert "denoise: out of memory" in event
    assert "blocks resident" in event


@pytest.mark.parametrize("step", range(2 * STEPS))
def test_finished_batches_are_not_denoised_again(step: int, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tiny_klein, batch_size=1).images
    failing = Failing(Denoiser._predict, step)
    monkeypatch.setattr(Denoiser, "_predict", failing.patched())
    assert torch.equal(run(tiny_klein, batch_size=1).images, expected)
    assert failing.calls == 2 * STEPS + 1


@pytest.mark.parametrize(
    ("owner", "method", "stage"),
    [
        (TextEncoder, "encode", "encode"),
        (TextEncoder, "__init__", "encode"),
        (Denoiser, "_condition", "denoise"),
        (Denoiser, "_load_blocks", "denoise"),
    ],
)
def test_running_out_while_loading_or_encoding_is_survived(
    owner: type, method: str, stage: str, tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, Failing(getattr(owner, method), 0).patched())
    result = run(tiny_klein)
    assert torch.equal(result.images, unbroken)
    assert f"{stage}: out of memory" in result.report.events[0]


def test_decode_falls_back_to_tiles_and_keeps_finished_pictures(
    tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pictures() -> Generation:
        with Engine(str(tiny_klein), dtype="fp32") as engine:
            return engine.generate(
                PROMPTS, num_inference_steps=1, height=256, width=256, max_sequence_length=64, seed=5, output_type="pt"
            )

    expected = pictures().images
    failing = Failing(Decoder.decode, 1)
    monkeypatch.setattr(Decoder, "decode", failing.patched())
    result = pictures()
    assert failing.calls == 3
    assert torch.equal(result.images[0], expected[0])
    assert result.images[1].shape == expected[1].shape
    assert "tiles of" in result.report.events[0]
    assert result.report.plan.stage("decode").tile_px > 0


def test_a_picture_says_by_which_tiles_it_was_made(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem_flux2 import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Decoder, "decode", Failing(Decoder.decode, 1).patched())
    command = ["generate", "-q", "-m", str(tiny_klein), "-p", "x", "-W", "256", "-H", "256", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["lowmem-flux2", *command, "--num-images", "2", "-s", "3"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    tiles = [Image.open(name).text["vae_tile"] for name in ("out_3.png", "out_4.png")]
    assert tiles[0] == "off"
    assert int(tiles[1]) > 0


def test_the_last_rung_fails_with_a_remedy(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(Denoiser._predict, None)
    monkeypatch.setattr(Denoiser, "_predict", failing.patched())
    with pytest.raises(RunError, match=r"denoise: out of memory, and no plan has a lower peak .*smaller"):
        run(tiny_klein)
    assert 2 <= failing.calls <= 20
