"""Upsampled captions are the stock pipeline's, wherever the encoder's layers are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowmem_flux2 import Engine
from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.job import resolve_machine
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.runtime import upsample
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.upsample import Upsampler
from lowmem_flux2.runtime.weights import CheckpointWeights

WEIGHTS = "text_encoder/model.safetensors"
PROMPTS = ["a red circle", "a dog at night in the snow"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


LAYERS = 3


def soon_over(folder: Path) -> Path:
    """Many tokens end a text."""
    ends = {"eos_token_id": list(range(20, 90)), "pad_token_id": 11, "bos_token_id": 1}
    (folder / "text_encoder/generation_config.json").write_text(json.dumps(ends))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dev checkpoint with an encoder of three layers: upsampling takes all of them, however many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "MISTRAL_LAYERS", LAYERS)
        return soon_over(tiny.write_dev(tmp_path_factory.mktemp("upsampling") / "dev"))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Callable[[str], Any]:
    """``stock(dtype)``: the stock pipeline."""

    def load(dtype: str) -> Any:
        pipeline = tiny.load_stock(folder, DTYPES[dtype], align=True)
        if not hasattr(pipeline.tokenizer, "tokenizer"):  # a processor has one
            pipeline.tokenizer.tokenizer = pipeline.tokenizer
        return pipeline

    return load


def upsampled(folder: Path, placements: tuple[Placement, ...], dtype: str, temperature: float, seed: int) -> list[str]:
    layers = (placements * LAYERS)[:LAYERS]
    slots = 0 if set(layers) == {Placement.GPU} else 2
    bare = StagePlan.bare("upsample", dtype, dtype)
    stage = replace(bare, block_placements=layers, slots=slots, prefetch_depth=max(slots - 1, 0))
    upsampler = Upsampler(folder, stage, torch.device("cpu"), pytest.fail, CheckpointWeights(folder))
    try:
        return upsampler.upsample(PROMPTS, temperature, seed)
    finally:
        upsampler.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "seed"), [(0.15, 3), (1.0, 4)])
def test_captions_are_those_of_the_stock_pipeline(
    dtype: str, temperature: float, seed: int, folder: Path, stock: Callable[[str], Any]
) -> None:
    torch.manual_seed(seed)
    expected = stock(dtype).upsample_prompt(PROMPTS, temperature=temperature)
    before = torch.random.get_rng_state()
    made = upsampled(folder, tuple(Placement), dtype, temperature, seed)
    assert made == expected
    assert all(made)
    assert temperature < 1 or len(set(made)) == 2
    assert torch.equal(torch.random.get_rng_state(), before)
    assert made == upsampled(folder, (Placement.GPU,), dtype, temperature, seed)


def test_live_bytes_are_as_predicted(folder: Path, tiny_dev: Path) -> None:
    spec = resolve_model(str(tiny_dev)).spec
    spec = replace(spec, text_encoder=replace(spec.text_encoder, num_layers=LAYERS))
    request = make_request(spec, tuple(PROMPTS), height=64, width=64, caption_upsample_temperature=0.5)
    stage = replace(StagePlan.bare("upsample", "bf16", "bf16"), batch_size=2)
    stage = replace(stage, block_placements=(Placement.GPU,) * LAYERS)
    work = stage_work(stage, spec, workload_of(request, spec), resolve_machine("cpu", "cpu").hardware)
    with LiveBytes() as live:
        upsampled(folder, (Placement.GPU,), "bf16", 0.5, 1)
    predicted = work.kept_bytes + sum(work.block_bytes) + work.activation_bytes
    assert predicted == pytest.approx(live.peak_bytes["cpu"], rel=0.03)


@pytest.mark.parametrize("form", ["klein", "distilled"])
def test_klein_has_none(form: str, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="klein form, whose pipeline has none"):
        Engine(str(folders[form])).generate("a dog", caption_upsample_temperature=0.15)


def test_what_cannot_be_upsampled_is_refused(tiny_dev: Path) -> None:
    engine = Engine(str(tiny_dev))
    with pytest.raises(UsageError, match="no prompt to upsample"):
        embeds = torch.zeros(1, 64, 3 * tiny.HIDDEN)
        engine.generate(prompt_embeds=embeds, caption_upsample_temperature=0.15)
    with pytest.raises(UsageError, match="temperature must be above 0"):
        engine.generate("a dog", caption_upsample_temperature=-1.0)


def test_a_batch_is_refused(tiny_dev: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a dog\n")
    command = ["generate", "-m", str(tiny_dev), "--prompt-file", str(tmp_path / "p.txt"), "--caption-upsample", "0.15"]
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, UsageError)
    assert "not yet for batches" in str(refused.exception)


def test_an_encoder_without_what_writes_is_told_from_a_whole_one(tmp_path: Path, folder: Path) -> None:
    cut = Path(shutil.copytree(folder, tmp_path / "cut"))
    weights = load_file(cut / "text_encoder/model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "lm_head" not in name}, cut / WEIGHTS)
    with pytest.raises(CheckpointBroken, match="it has no lm_head, which upsampling a caption needs"):
        upsampled(cut, (Placement.GPU,), "fp32", 0.15, 0)


def test_a_run_upsamples_once_and_says_what_it_made(
    tiny_dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upsample, "PROMPT_TOKENS", 64)  # less than the instruction has, so that it is quick
    folder = str(soon_over(Path(shutil.copytree(tiny_dev, tmp_path / "dev"))))
    asked = ["-m", folder, "-p", "a dog", "-W", "64", "-H", "64", "--steps", "1", "--max-sequence-length", "64"]
    command = ["generate", *asked, "-s", "4", "--caption-upsample", "1.5"]
    ran = CliRunner().invoke(app, [*command, "--report", "r.json", "--save-latents", "l", "-o", "x.png"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(Path("r.json").read_text())
    assert [stage["stage"] for stage in report["measured"]["stages"]] == ["upsample", "encode", "denoise", "decode"]
    (image,) = report["images"]
    made = image["upsampled_prompt"]
    assert image["prompt"] == "a dog" and image["upsample_seed"] == 4 and made
    assert "upsampled prompt: " in ran.output
    picture = Image.open("x.png")
    texts = picture.text
    assert (texts["prompt"], texts["upsampled_prompt"]) == ("a dog", made)
    assert texts["caption_upsample"] == "temperature 1.5, seed 4"

    Path("plan.json").write_text(json.dumps(report["plan"]))
    again = CliRunner().invoke(
        app, ["generate", "--plan", "plan.json", "-m", folder, "-p", "a dog", "-s", "4", "-o", "y.png"]
    )
    assert again.exit_code == 0, again.output
    assert np.array_equal(np.asarray(Image.open("y.png")), np.asarray(picture))
    decoded = CliRunner().invoke(app, ["generate", "--from-latents", "l", "-o", "z.png"])
    assert decoded.exit_code == 0, decoded.output
    assert Image.open("z.png").text["upsampled_prompt"] == made
    plain = Engine(folder).generate(made, seed=4, width=64, height=64, num_inference_steps=1, max_sequence_length=64)
    assert np.array_equal(np.asarray(plain.images[0]), np.asarray(picture))
