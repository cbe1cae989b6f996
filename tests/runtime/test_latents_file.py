"""Latents in a file: saved on purpose or when decoding failed, decoded later to the very same pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from command_line import Run, runner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from lowmem_flux2 import Engine
from lowmem_flux2.errors import CheckpointBroken, DecodeFailed, NonFiniteLatents, UsageError
from lowmem_flux2.planning.plan import FormatChange, Plan
from lowmem_flux2.runtime.checked import write_checked
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.latents_file import SavedLatents, read_latents

PROMPTS = ["a red circle", "a blue dog"]
ASKED: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 64, "seed": 5}


@pytest.fixture
def engine(tiny_klein: Path) -> Engine:
    return Engine(str(tiny_klein), dtype="fp32")


def no_memory(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def forbid_all_but_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in (TextEncoder, Denoiser):
        monkeypatch.setattr(owner, "__init__", lambda *_, **__: pytest.fail("more than the VAE was loaded"))


# ---------------------------------------------------------------------------------------------------------- Python


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_saved_latents_decode_to_the_same_pictures(
    form: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(str(folders[form]), dtype="bf16")
    made = engine.generate(PROMPTS, **ASKED, output_type="np", save_latents=tmp_path / "a.safetensors")
    assert made.latents_file == tmp_path / "a.safetensors"
    forbid_all_but_decoding(monkeypatch)
    again = Engine(str(folders[form])).generate(from_latents=made.latents_file, output_type="np")
    assert np.array_equal(made.images, again.images)
    assert again.seeds == made.seeds == (5, 6)
    assert [image.prompt for image in again.report.images] == PROMPTS
    assert [stage.stage for stage in again.report.plan.stages] == ["decode"]
    assert again.report.plan.stage("decode").compute_dtype == "bf16"  # the latents' own, whatever auto would be
    assert [stage.stage for stage in again.report.stages] == ["decode"]
    plan = json.loads(json.dumps(again.report.to_json()))["plan"]
    assert Plan.from_json(plan, "report") == again.report.plan
    assert again.report.table().row_count == 2


def test_only_the_vae_is_read(tiny_klein: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    engine = Engine(str(folder), dtype="fp32")
    made = engine.generate(PROMPTS[0], **ASKED, output_type="np", save_latents=tmp_path / "a.safetensors")
    for part in ("text_encoder", "transformer", "tokenizer"):
        shutil.rmtree(folder / part)
    again = engine.generate(from_latents=tmp_path / "a.safetensors", output_type="np")
    assert np.array_equal(made.images, again.images)


def test_a_file_that_is_there_is_not_replaced(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("mine")
    made = engine.generate(PROMPTS[0], **ASKED, save_latents=tmp_path / "a.safetensors")
    assert made.latents_file == tmp_path / "a_2.safetensors"
    assert (tmp_path / "a.safetensors").read_text() == "mine"


def test_latents_that_cannot_be_saved_lose_no_picture(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = engine.generate(PROMPTS[0], **ASKED, save_latents=tmp_path / "file" / "a.safetensors")
    assert made.latents_file is None
    assert len(made.images) == 1
    assert "could not be saved" in made.report.events[0]


def test_a_failed_decode_keeps_the_latents_of_the_pictures_that_are_missing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**ASKED, "num_images_per_prompt": 2, "output_type": "np"}
    expected = engine.generate(PROMPTS, **asked).images
    decode, calls = Decoder.decode, []

    def only_the_first(*args: Any) -> Any:
        calls.append(1)
        return decode(*args) if len(calls) == 1 else no_memory()

    monkeypatch.setattr(Decoder, "decode", only_the_first)
    with pytest.raises(DecodeFailed, match="decode: out of memory") as failed:
        engine.generate(PROMPTS, **asked)
    monkeypatch.setattr(Decoder, "decode", decode)
    rest = engine.generate(from_latents=failed.value.latents, output_type="np")
    assert np.array_equal(rest.images, expected[1:])
    assert rest.seeds == (6, 7, 8)
    assert [image.prompt for image in rest.report.images] == [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert failed.value.exit_code == 5


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(NonFiniteLatents("NaN"), 5), (CheckpointBroken("cut"), 4), (OSError(28, "No space left on device"), 5)],
)
def test_whatever_stops_decoding_keeps_the_latents(
    error: Exception, exit_code: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(Decoder, "decode", fail)
        with pytest.raises(DecodeFailed) as failed:
            engine.generate(PROMPTS[0], **ASKED)
    assert failed.value.exit_code == exit_code
    assert failed.value.__cause__ is error
    assert len(engine.generate(from_latents=failed.value.latents).images) == 1


def test_what_is_wrong_before_decoding_keeps_none(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Forward, "predict", no_memory)
    with pytest.raises(Exception, match="denoise: out of memory") as failed:
        engine.generate(PROMPTS[0], **ASKED)
    assert not isinstance(failed.value, DecodeFailed)


@pytest.mark.parametrize("given", [{"prompt": "x"}, {"seed": 1}, {"height": 64}, {"num_images_per_prompt": 2}])
def test_nothing_can_be_asked_of_latents_that_are_done(given: dict[str, Any], engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"from_latents: .*leave them out"):
        engine.generate(from_latents=tmp_path / "a.safetensors", **given)


# ------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture(scope="module")
def saved(tiny_klein: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "a.safetensors"
    Engine(str(tiny_klein), dtype="fp32").generate(PROMPTS, **ASKED, save_latents=path)
    return path


def test_what_is_read_is_what_was_saved(saved: Path, tmp_path: Path) -> None:
    one = read_latents(saved)
    change = FormatChange("denoise", "bf16", "int8", (1,), (2, 3), 4)
    other = replace(one, origin=replace(one.origin, plan=replace(one.origin.plan, format_changes=(change,))))
    again = read_latents(other.save(tmp_path / "b.safetensors"))
    assert again.origin == other.origin
    assert torch.equal(again.latents, one.latents)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused(data: st.DataObject, saved: Path, tmp_path: Path) -> None:
    broken = bytearray(saved.read_bytes())
    if data.draw(st.booleans()):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del broken[data.draw(st.integers(0, len(broken) - 1)) :]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(broken)
    try:
        found = read_latents(path)
    except CheckpointBroken as error:
        assert str(path) in str(error)
    else:  # a space of the header's padding
        assert torch.equal(found.latents, read_latents(saved).latents)


def test_foreign_and_missing_files_are_refused(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(UsageError, match=r"none.safetensors: cannot read the latents: No such file"):
        read_latents(tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match="cannot read"):
        read_latents(tmp_path)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointBroken, match="no latents file"):
        read_latents(foreign)
    with foreign.open("wb") as file:
        write_checked(file, {"embeddings": torch.zeros(3)}, {})
    with pytest.raises(CheckpointBroken, match="not a latents file that this version wrote"):
        read_latents(foreign)
    one = read_latents(saved)
    short = replace(one, latents=one.latents[:1]).save(tmp_path / "short.safetensors")
    with pytest.raises(CheckpointBroken, match="do not belong together"):
        read_latents(short)


@dataclass(frozen=True)
class Other:
    """How the model that decodes differs from the one that made the latents."""

    change: Callable[[dict[str, torch.Tensor]], None]
    fits: bool


OTHERS = {
    "another VAE": Other(lambda weights: weights["bn.running_mean"].add_(1.0), fits=False),
    "a copy rounded to bf16": Other(
        lambda weights: [value.copy_(value.bfloat16()) for value in weights.values() if value.is_floating_point()],
        fits=True,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_latents_are_decoded_by_the_vae_that_they_are_for(
    name: str, saved: Path, tiny_klein: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "model"))
    path = next((folder / "vae").glob("*.safetensors"))
    weights = {key: value.clone() for key, value in load_file(path).items()}
    OTHERS[name].change(weights)
    save_file(weights, path)
    engine = Engine(str(folder), dtype="fp32")
    if OTHERS[name].fits:
        assert len(engine.generate(from_latents=saved).images) == 2
    else:
        with pytest.raises(UsageError, match="whose VAE is not that of"):
            engine.generate(from_latents=saved)


def test_latents_with_other_channels_are_refused(saved: Path, engine: Engine) -> None:
    one = read_latents(saved)
    with pytest.raises(UsageError, match=r"the latents: latents of klein with 24 tokens of 16 channels; klein has 24"):
        engine.generate(from_latents=replace(one, latents=one.latents[..., :16]))
    with pytest.raises(UsageError, match="whose VAE is not that of shapes"):
        Engine("shapes").generate(from_latents=one)


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return runner(monkeypatch, capsys)


def generate(folder: Path, *more: str) -> list[str]:
    asked = ["-p", PROMPTS[0], "-p", PROMPTS[1], "-W", "96", "-H", "64", "--steps", "2", "--guidance", "4"]
    return ["generate", "-q", "-m", str(folder), *asked, "--negative-prompt", "a cat", "-s", "7", *more]


def test_the_command_that_is_printed_makes_the_pictures(
    run: Run, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shlex

    assert run(*generate(tiny_klein, "-o", "whole_{seed}.png")).code == 0
    with monkeypatch.context() as broken:
        broken.setattr(Decoder, "decode", no_memory)
        failed = run(*generate(tiny_klein, "-o", "it's_{seed}.png"))
    assert failed.code == 5
    assert "decode: out of memory" in failed.err
    assert "are saved in it's_7.latents.safetensors" in failed.err
    assert "Traceback" not in failed.err
    command = next(line for line in failed.err.splitlines() if "--from-latents" in line)
    forbid_all_but_decoding(monkeypatch)
    resumed = run(*shlex.split(command)[1:], "--report", "report.json")
    assert resumed.code == 0, resumed.err
    assert "it's_7.png   seed 7" in resumed.out
    for seed in (7, 8):
        whole, later = Image.open(f"whole_{seed}.png"), Image.open(f"it's_{seed}.png")
        assert np.array_equal(np.asarray(whole), np.asarray(later))
        assert whole.text == later.text  # nothing tells that it was made in two goes
    report = json.loads((tmp_path / "report.json").read_text())
    assert [image["seed"] for image in report["images"]] == [7, 8]
    assert [stage["stage"] for stage in report["plan"]["stages"]] == ["decode"]


def test_latents_are_saved_on_purpose_and_explained(run: Run, tiny_klein: Path) -> None:
    ran = run(*generate(tiny_klein, "--save-latents", "kept.safetensors"))
    assert ran.code == 0, ran.err
    assert "kept.safetensors   latents" in ran.out
    dry = run("generate", "--from-latents", "kept.safetensors", "--dry-run", "--vae-tile", "64")
    assert dry.code == 0, dry.err
    assert "decode:" in dry.out and "encode:" not in dry.out
    assert "encode" not in dry.out
    assert "2 images of 96x64, denoised already" in dry.out
    tiled = run("generate", "-q", "--from-latents", "kept.safetensors", "--vae-tile", "64", "-o", "tiled_{index}.png")
    assert tiled.code == 0, tiled.err
    assert Image.open("tiled_1.png").text["vae_tile"] == "64"
    assert Image.open("tiled_1.png").text["seed"] == "8"


def test_the_file_of_a_failed_run_is_the_one_that_was_asked_for(
    run: Run, tiny_klein: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "decode", no_memory)
    failed = run(*generate(tiny_klein, "--save-latents", "kept.safetensors"))
    assert "are saved in kept.safetensors" in failed.err
    assert [path.name for path in Path.cwd().iterdir()] == ["kept.safetensors"]
    again = run("generate", "-q", "--from-latents", "kept.safetensors")
    assert again.code == 5
    assert "still in kept.safetensors" in again.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-p", "x"], "--from-latents: prompt"),
        (["-s", "1"], "--from-latents: prompt"),
        (["--steps", "4"], "--from-latents: prompt"),
        (["--weight-format", "int8"], "--from-latents decodes only"),
        (["--plan", "b.json"], "leave out --plan and all flags about what to draw but"),
        ([], "cannot read the latents"),
        (["-m", "nowhere/nothing", "--offline"], "cannot read the latents"),
    ],
)
def test_bad_requests_exit_2(flags: list[str], said: str, run: Run) -> None:
    ran = run("generate", "--from-latents", "none.safetensors", *flags)
    assert ran.code == 2
    assert said in ran.err


def test_a_model_that_has_moved_is_asked_for(run: Run, tiny_klein: Path, tmp_path: Path, saved: Path) -> None:
    folder = Path(shutil.copytree(tiny_klein, tmp_path / "here"))
    assert run(*generate(folder, "--save-latents", "kept.safetensors")).code == 0
    folder.rename(tmp_path / "there")
    ran = run("generate", "--from-latents", "kept.safetensors")
    assert ran.code == 2
    assert "give the model that made the latents with -m" in ran.err
    assert run("generate", "-q", "-m", "./there", "--from-latents", "kept.safetensors", "-o", "b.png").code == 0
    other = run("generate", "-m", "shapes", "--from-latents", "kept.safetensors")
    assert other.code == 2
    assert "whose VAE is not that of shapes" in other.err


def test_a_decode_plan_is_no_plan_for_prompts(run: Run, tiny_klein: Path) -> None:
    run(*generate(tiny_klein, "--save-latents", "kept.safetensors"))
    run("generate", "-q", "--from-latents", "kept.safetensors", "-o", "b.png", "--report", "report.json")
    plan = json.loads(Path("report.json").read_text())["plan"]
    Path("plan.json").write_text(json.dumps(plan))
    ran = run(*generate(tiny_klein, "--plan", "plan.json"))
    assert ran.code == 2
    assert "--from-latents" in ran.err


def test_seeds_of_generators_are_unknown_and_say_so(engine: Engine, tmp_path: Path) -> None:
    asked = {**ASKED, "generator": torch.Generator().manual_seed(0)}
    del asked["seed"]
    made = engine.generate(PROMPTS[0], **asked, save_latents=tmp_path / "a.safetensors")
    found = read_latents(tmp_path / "a.safetensors")
    assert isinstance(found, SavedLatents)
    assert made.seeds == (None,)
    assert found.origin.images[0].seed is None
    assert found.latents.shape == (1, 24, 4 * tiny.LATENT_CHANNELS)
