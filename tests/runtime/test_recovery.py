"""The recovery ladder: out of memory at every stage and step, and the run goes on with the same pixels."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.errors import DecodeFailed, RunError
from lowmem_flux2.planning.plan import FormatChange, StagePlan
from lowmem_flux2.runtime import layout, streaming
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.forward import Forward

STEPS = 4
PROMPTS = ["a red circle", "a blue dog"]


ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More details"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuda": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "host": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 1099511627776 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError(),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


class Failing:
    """Makes a method raise an error of memory at its n-th calls (counted from 0), or at every call."""

    def __init__(self, method: Callable[..., Any], *at: int | None, error: str = "device") -> None:
        self._method, self._at, self._error = method, at, ERRORS[error]
        self.calls = 0

    def patched(self) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if self._at == (None,) or number in self._at:
                raise self._error
            return self._method(*args, **kwargs)

        return call


ASKED: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    "height": 64,
    "width": 64,
    "max_sequence_length": 64,
    "seed": 5,
    "output_type": "pt",
}


def run(folder: Path, **options: Any) -> Generation:
    with Engine(str(folder), dtype="fp32", **options) as engine:
        return engine.generate(PROMPTS, **ASKED)


@pytest.fixture(scope="module")
def unbroken(tiny_klein: Path) -> torch.Tensor:
    return run(tiny_klein).images


@pytest.mark.parametrize("step", range(STEPS))
def test_denoise_goes_on_at_the_step_that_failed(
    step: int, tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(Forward.predict, step)
    monkeypatch.setattr(Forward, "predict", failing.patched())
    result = run(tiny_klein)
    assert torch.equal(result.images, unbroken)
    assert failing.calls == STEPS + 1  # only the failed step was tried twice
    (event,) = result.report.events
    assert "denoise: out of memory" in event
    assert "blocks resident" in event


@pytest.mark.parametrize("step", range(2 * STEPS))
def test_finished_batches_are_not_denoised_again(step: int, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(tiny_klein, batch_size=1).images
    failing = Failing(Forward.predict, step)
    monkeypatch.setattr(Forward, "predict", failing.patched())
    assert torch.equal(run(tiny_klein, batch_size=1).images, expected)
    assert failing.calls == 2 * STEPS + 1


@pytest.mark.parametrize(
    ("owner", "method", "stage"),
    [
        (TextEncoder, "encode", "encode"),
        (TextEncoder, "__init__", "encode"),
        (Denoiser, "_projected", "denoise"),
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


@pytest.mark.parametrize("error", ERRORS)
def test_every_kind_of_memory_may_run_out(
    error: str, tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forward, "predict", Failing(Forward.predict, 2, error=error).patched())
    result = run(tiny_klein)
    assert torch.equal(result.images, unbroken)
    (event,) = result.report.events
    assert ("denoise: out of RAM" if error in ("host", "python", "system") else "denoise: out of memory") in event
    assert "enforce fail" not in event


def test_other_errors_are_not_taken_for_it(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Forward, "predict", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(tiny_klein)


@pytest.mark.parametrize("failures", [(0,), (0, 1)])
@pytest.mark.parametrize("step", [None, 1])
def test_running_out_again_while_loading_the_next_rung_takes_another(
    failures: tuple[int, ...],
    step: int | None,
    tiny_klein: Path,
    unbroken: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step fails, and then so do the reloads; or loading fails from the start."""
    loads = failures if step is None else tuple(number + 1 for number in failures)
    monkeypatch.setattr(Denoiser, "_load_blocks", Failing(Denoiser._load_blocks, *loads).patched())
    steps = Failing(Forward.predict, *([] if step is None else [step]))
    monkeypatch.setattr(Forward, "predict", steps.patched())
    result = run(tiny_klein, placement="resident")
    assert torch.equal(result.images, unbroken)
    assert len(result.report.events) == len(failures) + (step is not None)
    assert steps.calls == STEPS + (step is not None)
    planned = [event for event in result.report.events if "blocks resident" in event]
    assert len(set(planned)) == len(planned)  # each rung is another


@pytest.mark.parametrize("number", range(14))
def test_any_allocation_may_fail(
    number: int, tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the spans of weights and slots that a run over disk allocates, each may be the one too many."""
    failing = Failing(layout.allocate, number)
    for module in (layout, streaming):
        monkeypatch.setattr(module, "allocate", failing.patched())
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with Engine(str(tiny_klein), dtype="fp32", placement="disk") as engine:
        try:
            result = engine.generate(PROMPTS, **ASKED)
        except DecodeFailed as failed:  # so small a picture has no tiles
            result = engine.generate(from_latents=failed.latents, output_type="pt")
        else:
            assert len(result.report.events) == (number < failing.calls)
    assert torch.equal(result.images, unbroken)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("block-reader")]


def test_passes_over_the_encoder_that_are_done_are_not_repeated(
    tiny_klein: Path, unbroken: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_flux2.planning.batches.WAITING_MOST_BYTES", 0)  # a pass for each batch
    failing = Failing(TextEncoder.encode, 1)
    monkeypatch.setattr(TextEncoder, "encode", failing.patched())
    result = run(tiny_klein)
    assert torch.equal(result.images, unbroken)
    assert failing.calls == 3  # the prompts, then the negative ones twice


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
    failing = Failing(Forward.predict, None)
    monkeypatch.setattr(Forward, "predict", failing.patched())
    with pytest.raises(RunError, match=r"denoise: out of memory, and no plan has a lower peak .*smaller"):
        run(tiny_klein)
    assert 2 <= failing.calls <= 20


# ----------------------------------------------------------------------------------------- a smaller weight format


def generate(folder: Path, steps: list[torch.Tensor] | None = None, **options: Any) -> Generation:
    """Three images, one at a time; `steps` takes the latents after each step."""

    def note(_: object, __: int, ___: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
        if steps is not None:
            steps.append(kept["latents"].clone())

    with Engine(str(folder), dtype="fp32", batch_size=1, **options) as engine:
        return engine.generate([*PROMPTS, "a tree"], **ASKED, callback_on_step_end=note)


class NoRungs:
    """The ladder without its rungs of the same format, and a step that fails until the format is another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls = 0
        predict = Forward.predict

        def call(forward: Any, *args: Any, **kwargs: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number >= at and type(forward._transformer.transformer_blocks[0].attn.to_q) is torch.nn.Linear:
                raise ERRORS["device"]
            return predict(forward, *args, **kwargs)

        monkeypatch.setattr(Forward, "predict", call)


def test_no_format_is_changed_unless_allowed(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    NoRungs(monkeypatch, at=STEPS)
    with pytest.raises(RunError, match="allow one with --allow-format-change"):
        generate(tiny_klein)


def test_a_smaller_format_is_the_last_rung_and_goes_on_with_the_latents(
    tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[torch.Tensor] = []
    expected = generate(tiny_klein, whole).images
    broken: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        NoRungs(patch, at=STEPS + 2)
        result = generate(tiny_klein, broken, allow_format_change=True)
    done = STEPS + 2
    assert len(broken) == len(whole)
    assert all(torch.equal(one, other) for one, other in zip(broken[:done], whole[:done], strict=True))
    assert not torch.equal(broken[done], whole[done])
    assert torch.equal(result.images[0], expected[0])
    assert not torch.equal(result.images[1], expected[1])
    *rungs, last = result.report.events
    assert rungs, "formats come after all rungs of the same format"
    assert not [event for event in rungs if "weights in place of" in event]
    assert "int8 weights in place of fp32, which changes the picture" in last
    plan = result.report.plan
    assert plan.format_changes == (FormatChange("denoise", "fp32", "int8", (1,), (2,), 2),)
    formats = [plan.weight_format_of("denoise", image) for image in range(3)]
    assert formats == ["fp32", "fp32, int8 from step 3", "int8"]
    assert plan.weight_format_of("encode", 0) == "fp32"


def test_pictures_say_which_formats_they_were_made_with(
    tiny_klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowmem_flux2 import cli

    monkeypatch.chdir(tmp_path)
    NoRungs(monkeypatch, at=3)
    command = ["generate", "-m", str(tiny_klein), "-p", "x", "--steps", "2", "--num-images", "3", "-s", "3", "-W", "64"]
    command += ["-H", "64", "--batch-size", "1", "--dtype", "fp32", "--max-sequence-length", "64", "-q"]
    monkeypatch.setattr("sys.argv", ["lowmem-flux2", *command, "--allow-format-change", "--report", "report.json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "in place of fp32" in " ".join(capsys.readouterr().err.split())
    formats = [Image.open(f"out_{seed}.png").text["weight_format"] for seed in (3, 4, 5)]
    assert formats == ["fp32", "fp32, int8 from step 2", "int8"]


def test_the_encoder_may_change_its_format_too(tiny_klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, encode = TextEncoder.__init__, TextEncoder.encode
    formats: list[str] = []

    def noted(encoder: TextEncoder, folder: Path, model: Any, stage: StagePlan, *more: Any) -> None:
        formats.append(stage.weight_format)
        load(encoder, folder, model, stage, *more)

    def call(encoder: TextEncoder, batches: Any, *more: Any) -> Any:
        if batches == [(PROMPTS[1],)] and formats[-1] == "fp32":
            raise ERRORS["device"]
        return encode(encoder, batches, *more)

    monkeypatch.setattr(TextEncoder, "__init__", noted)
    monkeypatch.setattr(TextEncoder, "encode", call)
    monkeypatch.setattr("lowmem_flux2.planning.batches.WAITING_MOST_BYTES", 0)
    with Engine(str(tiny_klein), dtype="fp32", allow_format_change=True, prompt_cache="64MiB") as engine:
        asked = {"num_inference_steps": 1, "height": 64, "width": 64, "max_sequence_length": 64, "guidance_scale": 1.0}
        request = engine.request(PROMPTS, **asked)
        plan = engine.plan(request)
        stages = tuple(replace(stage, batch_size=1) for stage in plan.stages)
        made = engine.generate(PROMPTS, **asked, seed=5, plan=replace(plan, stages=stages))
        plan = made.report.plan
        assert [plan.weight_format_of("encode", image) for image in (0, 1)] == ["fp32", "int8"]
        again = engine.generate(PROMPTS, **asked, seed=5, plan=replace(plan, stages=stages))
    assert again.report.cached_prompts == (PROMPTS[0],)  # what another format made is not kept for this one
