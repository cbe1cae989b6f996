"""Interrupted runs: Ctrl-C stops after the step under way, and what goes on makes the same pictures, bit for bit."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import single_files
import torch
from command_line import Run, runner, signals_in
from safetensors.torch import save_file

from lowmem_flux2 import Engine
from lowmem_flux2.errors import CheckpointBroken, DecodeFailed, Interrupted, UsageError
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.interrupted_file import InterruptedRun, read_saved
from lowmem_flux2.runtime.interruption import Interruption
from lowmem_flux2.runtime.streaming import BlockStreamer

PROMPTS = ["a red circle", "a blue dog", "a green square"]
STEPS = 3
ASKED: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": STEPS, "max_sequence_length": 64, "seed": 5}
WAYS = {"dev": {}, "klein": {"guidance_scale": 4.0, "negative_prompt": "a cat"}}


def sigint() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def forbid(monkeypatch: pytest.MonkeyPatch, *owners: type) -> None:
    for owner in owners:
        monkeypatch.setattr(owner, "__init__", lambda *_, **__: pytest.fail("more was loaded than is needed"))


def interrupted_after(engine: Engine, step: int, **asked: Any) -> Interrupted | DecodeFailed:
    """The run stopped after so many steps of all its batches."""
    interruption, taken = Interruption(), []

    def count(*_: object) -> None:
        taken.append(1)
        if len(taken) == step:
            interruption.ask()

    with pytest.raises((Interrupted, DecodeFailed)) as stopped:
        engine.generate(PROMPTS, **ASKED, **asked, callback_on_step_end=count, interruption=interruption)
    assert len(taken) == step
    return stopped.value


@pytest.mark.parametrize("form", WAYS)
def test_a_run_goes_on_after_any_step(
    form: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches, of two images and of one: stopped in each, between them, and after all steps."""
    engine = Engine(str(folders[form]), dtype="bf16", batch_size=2)
    whole = engine.generate(PROMPTS, **ASKED, **WAYS[form], output_type="np")
    for step in range(1, 2 * STEPS, 1 if form == "dev" else 2):
        stopped = interrupted_after(engine, step, **WAYS[form])
        assert isinstance(stopped, Interrupted) and isinstance(stopped.run, InterruptedRun)
        assert stopped.exit_code == 130
        file = stopped.run.save(tmp_path / "a.safetensors")
        with monkeypatch.context() as patch:
            forbid(patch, TextEncoder)
            again = Engine(str(folders[form])).generate(from_latents=file, output_type="np")
        assert np.array_equal(again.images, whole.images)
        assert again.seeds == whole.seeds
        assert again.report.plan.digest == whole.report.plan.digest
    stopped = interrupted_after(engine, 2 * STEPS, **WAYS[form])
    assert isinstance(stopped, DecodeFailed) and stopped.exit_code == 130
    forbid(monkeypatch, TextEncoder, Denoiser)
    assert np.array_equal(engine.generate(from_latents=stopped.latents, output_type="np").images, whole.images)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_run_goes_on_with_the_text_that_a_callback_has_changed(
    in_place: bool, tiny_dev: Path, tmp_path: Path
) -> None:
    """Of the batch that was under way alone: the next batch is of the same prompt."""
    engine, interruption = Engine(str(tiny_dev), dtype="fp32", batch_size=1), Interruption()
    asked = {**ASKED, "num_images_per_prompt": 2, "output_type": "np"}
    steps: list[int] = []

    def weaken(_: object, step: int, __: object, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(step)
        if len(steps) > 1:
            return tensors
        return {"prompt_embeds": tensors["prompt_embeds"].mul_(0.5) if in_place else tensors["prompt_embeds"] * 0.5}

    def stop(*given: Any) -> dict[str, torch.Tensor]:
        interruption.ask()
        return weaken(*given)

    wanted = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    whole = engine.generate(PROMPTS[:1], **asked, **wanted, callback_on_step_end=weaken)
    steps.clear()
    with pytest.raises(Interrupted) as stopped:
        engine.generate(PROMPTS[:1], **asked, **wanted, callback_on_step_end=stop, interruption=interruption)
    file = stopped.value.run.save(tmp_path / "a.safetensors")
    assert np.array_equal(engine.generate(from_latents=file, output_type="np").images, whole.images)


def test_a_run_is_interrupted_twice(tiny_dev: Path) -> None:
    engine = Engine(str(tiny_dev), dtype="fp32", batch_size=1)
    sigmas = [1.0, 0.6, 0.3]
    asked = {**ASKED, "num_images_per_prompt": 2, "sigmas": sigmas}
    whole = engine.generate(PROMPTS[:2], **asked, output_type="np")
    first, second = Interruption(), Interruption()
    with pytest.raises(Interrupted) as stopped:
        engine.generate(PROMPTS[:2], **asked, callback_on_step_end=lambda *_: first.ask(), interruption=first)
    taken: list[int] = []

    def later(*_: object) -> None:
        taken.append(1)
        if len(taken) == STEPS + 1:
            second.ask()

    with pytest.raises(Interrupted) as again:
        engine.generate(from_latents=stopped.value.run, callback_on_step_end=later, interruption=second)
    assert again.value.run.finished.shape[0] == 1
    assert again.value.run.step == 2
    assert again.value.run.prompt_embeds.shape[0] == 2
    assert np.array_equal(engine.generate(from_latents=again.value.run, output_type="np").images, whole.images)


def test_with_a_step_cache_the_batch_under_way_goes_on(tiny_dev: Path) -> None:
    """Its next steps are forecast from earlier ones, which the run holds too."""
    engine = Engine(str(tiny_dev), dtype="fp32", batch_size=2, step_cache="taylor:interval=2,order=1,warmup=1,last=1")
    asked = {"num_inference_steps": 4}
    whole = engine.generate(PROMPTS, **{**ASKED, **asked}, output_type="np")
    interruption, taken = Interruption(), []

    def count(*_: object) -> None:
        taken.append(1)
        if len(taken) == 6:
            interruption.ask()

    with pytest.raises(Interrupted) as stopped:
        engine.generate(PROMPTS, **{**ASKED, **asked}, callback_on_step_end=count, interruption=interruption)
    assert stopped.value.run.step == 2
    assert len(stopped.value.run.finished) == 2
    again = engine.generate(from_latents=stopped.value.run, output_type="np")
    assert np.array_equal(again.images, whole.images)


def test_layers_and_pictures_stop_too(tiny_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(str(tiny_dev), dtype="fp32")
    interruption = Interruption()
    interruption.ask()
    with pytest.raises(Interrupted) as stopped:
        engine.generate(PROMPTS, **ASKED, interruption=interruption)
    assert stopped.value.run is None
    interruption = Interruption()
    decode, calls = Decoder.decode, []

    def second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            interruption.ask()
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", second)
        with pytest.raises(DecodeFailed) as failed:
            engine.generate(PROMPTS, **ASKED, interruption=interruption)
        assert len(failed.value.latents.latents) == 1
        calls.clear()
        # Asked for while the last picture is made, it comes too late to leave anything undone.
        interruption = Interruption()
        assert len(engine.generate(PROMPTS[:2], **ASKED, interruption=interruption).images) == 2


def test_another_transformer_and_other_files_are_refused(
    tiny_dev: Path, tiny_klein: Path, tiny_klein_distilled: Path, tmp_path: Path
) -> None:
    stopped = interrupted_after(Engine(str(tiny_klein), dtype="fp32"), 1)
    assert isinstance(stopped, Interrupted)
    run = stopped.run
    with pytest.raises(UsageError, match="made for something else"):
        Engine(str(tiny_dev), dtype="fp32").generate(from_latents=run)
    renamed = replace(run, weights="transformer-bf16-fp32-0123456789abcdef")
    with pytest.raises(UsageError, match="the latents: begun by klein with weights transformer-bf16"):
        Engine(str(tiny_klein)).generate(from_latents=renamed)
    file = run.save(tmp_path / "a.safetensors")
    found = read_saved(file)
    assert isinstance(found, InterruptedRun)
    assert found.origin == run.origin
    assert found.under_way is not None and torch.equal(found.under_way, run.under_way)
    broken = bytearray(file.read_bytes())
    broken[-1] ^= 1
    file.write_bytes(broken)
    with pytest.raises(CheckpointBroken, match=r"a.safetensors"):
        read_saved(file)
    short = replace(run, noise=run.noise[:1]).save(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointBroken, match="do not belong together"):
        read_saved(short)


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capfd)


def generate(folder: Path, *more: str) -> list[str]:
    asked = ["-p", PROMPTS[0], "-p", PROMPTS[1], "-W", "96", "-H", "64", "--steps", str(STEPS)]
    return ["generate", "-q", "-m", str(folder), *asked, "-s", "7", "--device", "cpu", *more]


def test_the_command_that_is_printed_goes_on(run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*generate(tiny_dev, "-o", "whole_{seed}.png")).code == 0
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        signals_in(patch, Forward, "predict", 2)
        stopped = run(*generate(tiny_dev, "-o", "it's_{seed}.png"))
    assert stopped.code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Ctrl-C again stops at once" in stopped.err
    assert "interrupted after 2 of 3 steps, saved in it's_7.interrupted.safetensors" in stopped.err
    assert not list(Path.cwd().glob("it's*.png"))
    command = next(line for line in stopped.err.splitlines() if "--from-latents" in line)
    assert "--device cpu" in command
    for flags in (["--dtype", "bf16"], ["-p", "x"], ["--vae-tile", "64"]):
        assert run(*shlex.split(command)[1:], *flags).code == 2
    assert f"{STEPS} steps" in run(*shlex.split(command)[1:], "--dry-run").out
    with monkeypatch.context() as patch:
        signals_in(patch, Decoder, "decode", 1)
        later = run(*shlex.split(command)[1:], "-q")
    assert later.code == 130
    assert Path("it's_7.png").exists()
    command = next(line for line in later.err.splitlines() if "--from-latents" in line)
    assert run(*shlex.split(command)[1:], "-q").code == 0
    for seed in (7, 8):
        assert Path(f"whole_{seed}.png").read_bytes() == Path(f"it's_{seed}.png").read_bytes()


def test_a_single_files_parts_and_what_is_to_be_written_are_in_the_printed_command(
    run: Run, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(single_files.bfl_state(single_files.transformer_state(tiny_klein)), "model.safetensors")
    parts = ["--text-encoder", str(tiny_klein), "--vae", str(tiny_klein), "--cache-dir", "cache"]
    asked = generate(Path("model.safetensors"), *parts, "--report", "r.json", "--no-metadata")
    assert run(*asked, "-o", "whole_{seed}.png").code == 0
    Path("r.json").unlink()
    with monkeypatch.context() as patch:
        signals_in(patch, Forward, "predict", 2)
        stopped = run(*asked, "-o", "then_{seed}.png", "--save-latents", "l.safetensors")
    assert stopped.code == 130, stopped.err
    command = next(line for line in stopped.err.splitlines() if "--from-latents" in line)
    gone_on = run(*shlex.split(command)[1:])
    assert gone_on.code == 0, gone_on.err
    for seed in (7, 8):
        assert Path(f"whole_{seed}.png").read_bytes() == Path(f"then_{seed}.png").read_bytes()
    assert Path("r.json").exists() and Path("l.safetensors").exists()
    assert run("generate", "--from-latents", "l.safetensors", "--save-latents", "again").code == 2
    assert run("generate", "--from-latents", "l.safetensors", "-o", "decoded.png").code == 0


@pytest.mark.parametrize(
    ("owner", "name", "signals", "said"),
    [
        (Forward, "predict", 2, "interrupted"),  # at once
        (TextEncoder, "_begin", 1, "interrupted before the first step; this begins again"),
        (BlockStreamer, "__init__", 1, "interrupted"),  # while weights are loaded
    ],
)
def test_nothing_is_kept_of_what_is_not_done(
    owner: type, name: str, signals: int, said: str, run: Run, tiny_dev: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    signals_in(monkeypatch, owner, name, 1, signals)
    stopped = run(*generate(tiny_dev))
    assert stopped.code == 130
    assert said in stopped.err
    assert not list(Path.cwd().iterdir())


def test_loading_the_vae_is_no_reason_to_lose_the_latents(
    run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals_in(monkeypatch, Decoder, "__init__", 1)
    stopped = run(*generate(tiny_dev))
    assert stopped.code == 130
    assert "--from-latents out_7.latents.safetensors" in stopped.err


def test_the_same_command_begins_again_with_the_seed_that_was_drawn(
    run: Run, tiny_dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals_in(monkeypatch, TextEncoder, "_begin", 1)
    stopped = run("generate", "-q", "-m", str(tiny_dev), "-p", "it's a dog", "--steps", "1")
    command = next(line for line in stopped.err.splitlines() if "lowmem-flux2 generate" in line)
    words = shlex.split(command)
    assert words[1:-2] == ["generate", "-q", "-m", str(tiny_dev), "-p", "it's a dog", "--steps", "1"]
    assert words[-2] == "-s" and int(words[-1]) >= 0


@pytest.fixture
def default_sigint() -> Iterator[None]:
    """Python's own handler: a shell that starts the tests in the background has SIGINT ignored, so it installs none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint")
def test_a_signal_in_python_is_a_keyboard_interrupt(tiny_dev: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Engine(str(tiny_dev)).generate(PROMPTS, **ASKED, callback_on_step_end=lambda *_: sigint())
    with Interruption().on_sigint() as interruption, pytest.raises(Interrupted) as stopped:
        Engine(str(tiny_dev)).generate(
            PROMPTS, **ASKED, callback_on_step_end=lambda *_: sigint(), interruption=interruption
        )
    assert stopped.value.run.step == 1
