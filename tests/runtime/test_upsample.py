"""Upsampled captions are the stock pipeline's, wherever the encoder's layers are."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import single_files
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoTokenizer
from transformers.models.pixtral import image_processing_pil_pixtral
from typer.testing import CliRunner

from lowmem_flux2 import Engine
from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.job import resolve_machine
from lowmem_flux2.planning.models import ModelSpec, VisionSpec, is_vision
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.stored import model_view
from lowmem_flux2.planning.upsampling import seeing_bytes
from lowmem_flux2.planning.weight_files import component_headers
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.runtime import upsample
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.upsample import Upsampler
from lowmem_flux2.runtime.vision import see, side_by_side
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


@pytest.fixture(scope="module")
def seeing_stock(folder: Path) -> Any:
    """The stock pipeline in fp32 with its PixtralProcessor, on transformers' image processor for Pillow, whose resizing
    ours is; the other one takes a torchvision to import."""
    torch_backend = "transformers.models.pixtral.image_processing_pixtral"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, torch_backend, image_processing_pil_pixtral)
        patch.delitem(sys.modules, "transformers.models.pixtral.processing_pixtral", raising=False)
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor

        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        image_processor = image_processing_pil_pixtral.PixtralImageProcessorPil.from_pretrained(folder / "tokenizer")
        sizes = {"patch_size": tiny.PATCH, "spatial_merge_size": tiny.MERGE}
        processor = PixtralProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, **sizes)
    pipeline: Any = tiny.load_stock(folder, torch.float32, align=True)
    pipeline.register_modules(tokenizer=processor)
    return pipeline


def upsampled(
    folder: Path,
    placements: tuple[Placement, ...],
    dtype: str,
    temperature: float,
    seed: int,
    picture: Image.Image | None = None,
    weight_format: str = "",
    cache: Path | None = None,
) -> list[str]:
    layers = (placements * LAYERS)[:LAYERS]
    slots = 0 if set(layers) == {Placement.GPU} else 2
    bare = StagePlan.bare("upsample", weight_format or dtype, dtype)
    stage = replace(bare, block_placements=layers, slots=slots, prefetch_depth=max(slots - 1, 0))
    stores = {}
    if cache is not None:
        stores["whole_text_encoder"] = prepare(
            folder, spec_of(folder), "whole_text_encoder", weight_format, dtype, cache
        )
    weights = CheckpointWeights(folder, stores)
    upsampler = Upsampler(folder, spec_of(folder), stage, torch.device("cpu"), pytest.fail, weights, picture)
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


def spec_of(folder: Path) -> ModelSpec:
    """Of the fixture's encoder, which has too few layers to encode with."""
    spec = resolve_model("flux2-dev").spec
    vision = VisionSpec(16, 32, 1, tiny.PATCH, tiny.MERGE, 64, 0)
    return replace(spec, text_encoder=replace(spec.text_encoder, num_layers=LAYERS, vision=vision))


def noise(width: int, height: int) -> Image.Image:
    drawn = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


@contextmanager
def first_scores() -> Iterator[list[torch.Tensor]]:
    """What lm_head makes after the prompt, (prompts, 1, vocabulary) of each ``generate`` within."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        if getattr(module, "out_features", 0) == tiny.VOCAB and not is_begun:
            found.append(made)
            is_begun.append(True)

    is_begun: list[bool] = []
    hook = register_module_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def test_with_references_captions_are_those_of_the_stock_pipeline(folder: Path, seeing_stock: Any) -> None:
    """Of one picture, and of two, which the stock method puts side by side; for each of the prompts."""
    for pictures in ([noise(96, 80)], [noise(64, 96), noise(900, 800)]):
        torch.manual_seed(3)
        with first_scores() as expected_scores:
            expected = seeing_stock.upsample_prompt(PROMPTS, images=[pictures] * 2, temperature=1.0)
        with first_scores() as scores:
            made = upsampled(folder, tuple(Placement), "fp32", 1.0, 3, side_by_side(pictures))
        with first_scores() as of_another:
            upsampled(folder, (Placement.GPU,), "fp32", 1.0, 3, Image.new("RGB", side_by_side(pictures).size))
        assert made == expected
        torch.testing.assert_close(scores[0], expected_scores[0], rtol=1e-5, atol=1e-5)
        assert (scores[0] - of_another[0]).abs().max() > 1e-3


def test_a_picture_and_a_prompt_that_are_too_long_together_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upsample, "PROMPT_TOKENS", 64)
    with pytest.raises(UsageError, match="together have more than 64 tokens; shorten the prompt"):
        upsampled(folder, (Placement.GPU,), "fp32", 1.0, 3, noise(64, 64))


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_a_quantized_encoder_writes_the_same_wherever_it_is(weight_format: str, folder: Path, tmp_path: Path) -> None:
    asked = ("fp32", 1.0, 3, None, weight_format, tmp_path)
    made = upsampled(folder, (Placement.GPU,), *asked)
    assert made == upsampled(folder, tuple(Placement), *asked)
    assert all(made)


def test_a_checkpoint_in_four_bits_writes_as_its_decoded_reference(folder: Path, tmp_path: Path) -> None:
    quantized, decoded = single_files.write_bnb(tmp_path, folder, "nf4", nested=True)
    asked = ((Placement.DISK,), "fp32", 1.0, 3, noise(64, 64))
    with first_scores() as scores:
        made = upsampled(quantized, *asked)
    with first_scores() as expected:
        assert made == upsampled(decoded, *asked)
    assert torch.equal(scores[0], expected[0])


def test_encoding_takes_the_whole_encoders_store(tiny_dev: Path, tmp_path: Path) -> None:
    spec = resolve_model(str(tiny_dev)).spec
    cut = prepare(tiny_dev, spec, "text_encoder", "int8", "fp32", tmp_path / "cut")
    whole = prepare(tiny_dev, spec, "whole_text_encoder", "int8", "fp32", tmp_path / "whole")
    assert len(whole.manifest.block_bytes) == spec.text_encoder.num_layers > len(cut.manifest.block_bytes)
    assert prepare(tiny_dev, spec, "text_encoder", "int8", "fp32", tmp_path / "whole").folder == whole.folder
    asked = {"seed": 1, "width": 64, "height": 64, "num_inference_steps": 1, "max_sequence_length": 64}
    latents = [
        Engine(str(tiny_dev), text_weight_format="int8", cache_dir=tmp_path / name, prompt_cache="off")
        .generate("a dog", output_type="latent", **asked)
        .images
        for name in ("cut", "whole")
    ]
    assert torch.equal(*latents)


@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4"])
def test_live_bytes_are_as_predicted(weight_format: str, folder: Path, tiny_dev: Path, tmp_path: Path) -> None:
    spec = resolve_model(str(tiny_dev)).spec
    spec = replace(spec, text_encoder=replace(spec.text_encoder, num_layers=LAYERS))
    request = make_request(spec, tuple(PROMPTS), height=64, width=64, caption_upsample_temperature=0.5)
    stage = replace(StagePlan.bare("upsample", weight_format, "bf16"), batch_size=2)
    stage = replace(stage, block_placements=(Placement.GPU,) * LAYERS)
    work = stage_work(stage, spec, workload_of(request, spec), resolve_machine("cpu", "cpu").hardware)
    cache = tmp_path if weight_format != "bf16" else None
    if cache is not None:
        prepare(folder, spec_of(folder), "whole_text_encoder", weight_format, "bf16", cache)
    with LiveBytes() as live:
        upsampled(folder, (Placement.GPU,), "bf16", 0.5, 1, None, weight_format, cache)
    predicted = work.kept_bytes + sum(work.block_bytes) + work.activation_bytes
    assert predicted == pytest.approx(live.peak_bytes["cpu"], rel=0.03)


def test_seeing_takes_no_more_than_is_planned(folder: Path) -> None:
    vision = VisionSpec(16, 32, 1, tiny.PATCH, tiny.MERGE, 64, 0)
    net, weights = upsample._net_on_meta(folder / "text_encoder"), CheckpointWeights(folder)
    with closing(weights.open("text_encoder")) as files, LiveBytes() as live, torch.no_grad():
        seen = see(net, vision, noise(64, 64), folder / "tokenizer", files, torch.float32, torch.device("cpu"))
    assert seen.embeddings.shape == (16, tiny.HIDDEN)
    count = sum(
        files_of.num_values
        for name, files_of in model_view(component_headers(folder / "text_encoder")).items()
        if is_vision(name)
    )
    planned = seeing_bytes(replace(vision, weights=count), tiny.HIDDEN, 4)
    assert 0.3 * planned < live.peak_bytes["cpu"] <= planned


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


def test_a_batch_is_upsampled_and_goes_on_where_it_was(
    tiny_dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, one with a reference image; stopped between them, and run again, to the bytes of single runs.

    The first line is not rewritten: each says so for itself.
    """
    monkeypatch.setattr(upsample, "PROMPT_TOKENS", 640)  # so that it is quick
    folder = str(soon_over(Path(shutil.copytree(tiny_dev, tmp_path / "dev"))))
    monkeypatch.chdir(tmp_path)
    noise(64, 64).save("r.png")
    lines = [{"prompt": "a hat", "seed": 9}, {"prompt": "a dog", "seed": 4}, {"prompt": "a cat", "seed": 5}]
    lines += [{"prompt": "a hat", "image": ["r.png"], "seed": 50}]
    lines = [lines[0], *({**line, "caption_upsample": 1.5} for line in lines[1:])]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["generate", "-m", folder, "-W", "64", "-H", "64", "--steps", "1", "--max-sequence-length", "64"]
    command = [*asked, "--prompt-file", "p.jsonl", "-o", "b_{seed}.png"]
    real = Upsampler.upsample
    begun: list[Any] = []

    def failing(self: Upsampler, prompts: Any, *others: Any) -> list[str]:
        begun.append(prompts)
        if len(begun) == 2:
            raise CheckpointBroken("the disk is gone")
        return real(self, prompts, *others)

    monkeypatch.setattr(Upsampler, "upsample", failing)
    stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code and "upsampled prompt: " in stopped.output
    assert begun == [("a dog", "a cat"), ("a hat",)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert begun == [("a dog", "a cat"), ("a hat",), ("a hat",)]
    singles = [
        ["-p", "a dog", "-p", "a cat", "-s", "4"],
        ["-p", "a hat", "-s", "50", "--image", "r.png"],
    ]
    rewritten = ["--caption-upsample", "1.5"]
    for words in (["-p", "a hat", "-s", "9"], *(words + rewritten for words in singles)):
        alone = CliRunner().invoke(app, [*asked, *words, "-o", "s_{seed}.png"])
        assert alone.exit_code == 0, alone.output
    assert Path("b_9.png").read_bytes() == Path("s_9.png").read_bytes()
    for seed in (4, 5, 50):
        ours, single = Image.open(f"b_{seed}.png"), Image.open(f"s_{seed}.png")
        assert np.array_equal(np.asarray(ours), np.asarray(single))
        assert ours.text["upsampled_prompt"] == single.text["upsampled_prompt"]
        assert ours.text["caption_upsample"] == single.text["caption_upsample"]
        assert ours.text["prompt"] in ("a dog", "a cat", "a hat")


def test_running_out_of_memory_at_a_token_writes_the_same(
    tiny_dev: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage begins again on the next rung, sampled with the same seed, with the picture still before it."""
    monkeypatch.setattr(upsample, "PROMPT_TOKENS", 640)
    folder = soon_over(Path(shutil.copytree(tiny_dev, tmp_path / "dev")))
    asked: dict[str, Any] = {"image": noise(64, 64), "caption_upsample_temperature": 1.5, "seed": 5, "height": 64}
    asked |= {"width": 64, "num_inference_steps": 1, "max_sequence_length": 64, "output_type": "latent"}
    engine = Engine(str(folder), dtype="fp32")
    unbroken = engine.generate("a dog", **asked)
    real, calls = upsample._EmbeddingRows.forward, []

    def failing(self: Any, ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, ids)

    monkeypatch.setattr(upsample._EmbeddingRows, "forward", failing)
    again = engine.generate("a dog", **asked)
    assert "upsample: out of memory" in again.report.events[0]
    assert len(calls) > 3
    assert torch.equal(again.images, unbroken.images)
    assert [one.upsampled_prompt for one in again.report.images] == [
        one.upsampled_prompt for one in unbroken.report.images
    ]


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
