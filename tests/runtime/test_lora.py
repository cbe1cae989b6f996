"""LoRAs at run time: the same pictures as with merged weights, wherever the blocks are, and no trace afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import loras
import numpy as np
import pytest
import tiny
import torch
from diffusers.loaders import lora_conversion_utils as converters
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from PIL import Image
from safetensors.torch import load_file, save_file

from lowmem_flux2 import Engine
from lowmem_flux2.planning.adapter_file import AdapterFile, read_adapter
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.job import plan_job, resolve_machine
from lowmem_flux2.planning.linears import is_conditioning, linears_of, stored_weights
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.workload import make_request
from lowmem_flux2.runtime.forward import Forward
from lowmem_flux2.runtime.latents_file import read_latents
from lowmem_flux2.runtime.quantize import STORED
from lowmem_flux2.simulating import compare_stage

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PLACES = {**{placed.value: (placed,) for placed in Placement}, "mixed": tuple(Placement)}
SIZE = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 64}
LATENTS: dict[str, Any] = {**SIZE, "output_type": "latent", "seed": 3}


def embeddings() -> dict[str, Any]:
    """Of two prompts, so that no text encoder is run."""
    return {"prompt_embeds": torch.randn(2, 64, 3 * tiny.HIDDEN, generator=torch.Generator().manual_seed(0))}


def made(folder: Path, *given: Any, **options: Any) -> torch.Tensor:
    engine = Engine(str(folder), **{"dtype": "fp32", **options})
    latents: torch.Tensor = engine.generate(**LATENTS, **embeddings(), guidance_scale=1.0, loras=given).images
    return latents


def deltas(file: AdapterFile) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each Linear's weight, worked out from its file."""
    stored, found = load_file(file.lora.path), {}
    for each in file.low_ranks:
        up = torch.cat([stored[each.up][first : first + count] for first, count in each.rows])
        found[each.linear] = file.lora.scale * each.factor * (up @ stored[each.down])
    return found


def merged(
    folder: Path, to: Path, added: dict[str, torch.Tensor], weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """A copy of the checkpoint with the deltas added to its weights."""
    shutil.copytree(folder, to)
    weights = weights or load_file(folder / WEIGHTS)
    save_file({k: v + added.get(k.removesuffix(".weight"), 0) for k, v in weights.items()}, to / WEIGHTS)
    return to


@pytest.fixture
def lora(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """``lora(form, ...)``: a file with factors for every Linear of the tiny checkpoint."""

    def write(form: str, seed: int = 0, size: float = 0.3, name: str = "all.safetensors") -> Path:
        dims = resolve_model(str(folders[form])).spec.transformer
        return loras.write(tmp_path / name, loras.diffusers_keys(loras.factors(dims, seed=seed, size=size)))

    return write


# ------------------------------------------------------------------------------------------------ which Linears


def test_names_and_shapes_are_the_modules_own(folders: dict[str, Path]) -> None:
    for form, embeds in (("dev", True), ("klein", False)):
        modules = tiny.make_transformer(guidance_embeds=embeds).named_modules()
        real = {n: (m.out_features, m.in_features) for n, m in modules if isinstance(m, torch.nn.Linear)}
        assert linears_of(resolve_model(str(folders[form])).spec.transformer) == real


def test_bfl_names_mean_what_the_checkpoint_converter_makes_of_them(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = resolve_model(str(folders["dev"])).spec
    names = loras.bfl_names(spec.transformer)
    path = loras.write(tmp_path / "bfl", loras.bfl_keys(loras.factors(spec.transformer, names)))
    stored, known = load_file(path), stored_weights(spec.transformer)
    full = {
        f"{name}.weight": stored[f"diffusion_model.{name}.lora_B.weight"]
        @ stored[f"diffusion_model.{name}.lora_A.weight"]
        for name in names
    }
    expected = convert_flux2_transformer_checkpoint_to_diffusers(dict(full))
    ours = deltas(read_adapter(Lora.of(path, 1.0), spec))
    assert sorted(expected) == sorted(f"{linear}.weight" for linear in ours)
    assert len(known) > len(names)
    for linear, delta in ours.items():
        assert torch.allclose(delta, expected[f"{linear}.weight"], atol=1e-6), linear


@pytest.mark.parametrize("form", ["bfl", "kohya"])
def test_adapters_mean_what_diffusers_lora_converters_make_of_them(
    form: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = resolve_model(str(folders["dev"])).spec
    # Of the final norm diffusers' LoRA converters forget that its halves are swapped; kohya's also lacks a few names.
    skipped = ("final_layer.adaLN", *(("guidance_in", "double_stream", "single_stream") if form == "kohya" else ()))
    names = [name for name in loras.bfl_names(spec.transformer) if not name.startswith(skipped)]
    made = loras.factors(spec.transformer, names)
    path = loras.write(tmp_path / form, loras.bfl_keys(made) if form == "bfl" else loras.kohya_keys(made, alpha=2.0))
    convert = {
        "bfl": converters._convert_non_diffusers_flux2_lora_to_diffusers,
        "kohya": converters._convert_kohya_flux2_lora_to_diffusers,
    }[form]
    theirs = convert(load_file(path))
    ours = deltas(read_adapter(Lora.of(path, 1.0), spec))
    assert len(theirs) == 2 * len(ours)
    for linear, delta in ours.items():
        down, up = (theirs[f"transformer.{linear}.lora_{half}.weight"] for half in "AB")
        assert torch.allclose(delta, up @ down, atol=1e-6), linear


# ----------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("form", ["dev", "klein"])
def test_latents_are_those_of_merged_weights(form: str, folders: dict[str, Path], lora: Any, tmp_path: Path) -> None:
    file = Lora.of(lora(form), 0.7)
    spec = resolve_model(str(folders[form])).spec
    applied, plain = made(folders[form], file), made(folders[form])
    expected = made(merged(folders[form], tmp_path / "merged", deltas(read_adapter(file, spec))))
    error, change = (float((applied - other).norm() / plain.norm()) for other in (expected, plain))
    assert change > 0.05
    assert error < 1e-5


def test_a_quantized_transformer_gets_it_without_being_dequantized(
    folders: dict[str, Path], lora: Any, tmp_path: Path
) -> None:
    folder, file = folders["klein"], Lora.of(lora("klein"), 0.7)
    weights = load_file(folder / WEIGHTS)
    expanded = dict(weights)
    for name, weight in weights.items():
        if "transformer_blocks" in name and weight.ndim == 2:
            linear = STORED["int8"](torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False), torch.float32)
            for key, value in linear.quantize(weight, torch.float32).items():
                linear._buffers[key] = value
            expanded[name] = linear.dequantize()
    added = deltas(read_adapter(file, resolve_model(str(folder)).spec))
    expected = made(merged(folder, tmp_path / "merged", added, expanded), text_weight_format="fp32")
    options = {"weight_format": "int8", "text_weight_format": "fp32"}
    applied, plain = made(folder, file, **options), made(folder, **options)
    assert float((applied - expected).norm() / expected.norm()) < 1e-5
    assert not torch.allclose(applied, plain, rtol=0.05)


def test_two_files_add_up_and_one_may_be_given_twice(folders: dict[str, Path], lora: Any, tmp_path: Path) -> None:
    folder = folders["klein"]
    first, second = Lora.of(lora("klein"), 0.5), Lora.of(lora("klein", seed=1, name="b"), -0.4)
    spec = resolve_model(str(folder)).spec
    one, other = (deltas(read_adapter(file, spec)) for file in (first, second))
    expected = made(merged(folder, tmp_path / "merged", {name: one[name] + other[name] for name in one}))
    assert float((made(folder, first, second) - expected).norm() / expected.norm()) < 1e-5
    twice = made(folder, (first.path, 0.25), (first.path, 0.25))
    assert float((twice - made(folder, first)).norm() / twice.norm()) < 1e-5


@pytest.mark.parametrize(("dtype", "weight_format"), [("fp32", "auto"), ("bf16", "auto"), ("bf16", "int8")])
def test_placement_changes_no_pixel(dtype: str, weight_format: str, folders: dict[str, Path], lora: Any) -> None:
    path = lora("klein")
    engine = Engine(str(folders["klein"]), dtype=dtype, weight_format=weight_format, loras=[path])
    plan = engine.plan(engine.request(["(embeddings)"] * 2, **SIZE, guidance_scale=4.0))
    negative = -embeddings()["prompt_embeds"]
    results = []
    for names in PLACES.values():
        stages = []
        for stage in plan.stages:
            blocks = len(stage.block_placements)
            placed = (names * blocks)[:blocks]
            stages.append(replace(stage, block_placements=placed, slots=2, prefetch_depth=1))
        placed_plan = replace(plan, stages=tuple(stages))
        given = {**embeddings(), "negative_prompt_embeds": negative, "guidance_scale": 4.0}
        results.append(engine.generate(**LATENTS, **given, plan=placed_plan).images)
    assert all(torch.equal(each, results[0]) for each in results)


def test_scale_zero_and_runs_after_it_are_as_if_it_had_never_been(folders: dict[str, Path], lora: Any) -> None:
    engine, path = Engine(str(folders["klein"]), dtype="fp32"), lora("klein")
    asked = {**LATENTS, **embeddings(), "guidance_scale": 1.0}
    never = engine.generate(**asked).images
    with_it = engine.generate(**asked, loras=[path]).images
    assert not torch.equal(with_it, never)
    assert torch.equal(engine.generate(**asked).images, never)
    assert torch.equal(engine.generate(**asked, loras=[(path, 0)]).images, never)
    kept = Engine(str(folders["klein"]), dtype="fp32", loras=[path])
    assert torch.equal(kept.generate(**asked).images, with_it)
    assert torch.equal(kept.generate(**asked, loras=()).images, never)


def test_out_of_memory_goes_on_with_it(folders: dict[str, Path], lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, predict, calls = lora("klein"), Forward.predict, []
    expected = made(folders["klein"], path)

    def failing(*arguments: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More details")
        return predict(*arguments, **more)

    monkeypatch.setattr(Forward, "predict", failing)
    assert torch.equal(made(folders["klein"], path), expected)
    assert len(calls) == 3


def test_factors_and_products_are_simulated_as_predicted(tmp_path: Path) -> None:
    """On blocks of klein-4b's size, of which there are three of one kind and two of the other."""
    source = resolve_model("flux2-klein-4b")
    configs = Path(shutil.copytree(source.configs, tmp_path / "configs"))
    config = json.loads((configs / "transformer/config.json").read_text())
    (configs / "transformer/config.json").write_text(json.dumps({**config, "num_layers": 2, "num_single_layers": 3}))
    dims = replace(source.spec.transformer, num_double=2, num_single=3)
    spec = replace(source.spec, transformer=dims)
    names = [name for name in linears_of(dims) if name.endswith(("linear_in", "to_qkv_mlp_proj", "img.linear"))]
    file = Lora.of(loras.write(tmp_path / "a", loras.diffusers_keys(loras.factors(dims, names, rank=32))), 1.0)
    machine, device = resolve_machine("rtx-4090-24gb", "auto"), []
    for given in ((), (file,)):
        request = make_request(spec, ("x",), width=512, height=512, loras=given)
        plan = plan_job(replace(source, spec=spec), machine, request, Selection())
        found = compare_stage(plan.stage("denoise"), plan.workload, spec, configs)
        assert abs(found.device_error) < 0.01
        device.append((found.predicted.device, found.simulated.device))
    added = [after - before for before, after in zip(*device, strict=True)]
    kept = sum(32 * sum(linears_of(dims)[name]) * 2 for name in names if not is_conditioning(name))
    assert kept <= added[1] <= added[0] <= 1.1 * added[1]


# ------------------------------------------------------------------------------------------------------ records


def test_pictures_reports_and_latents_say_what_was_added(
    folders: dict[str, Path], lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from lowmem_flux2.cli import app

    monkeypatch.chdir(tmp_path)
    path, folder = lora("klein"), str(folders["klein"])
    keys = {**load_file(path), "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": torch.zeros(4, 64)}
    save_file(keys, path)
    size = ["-W", "64", "-H", "64", "--steps", "2", "--max-sequence-length", "64"]
    command = ["generate", "-m", folder, "-p", "a dog", "-s", "1", *size, "--lora", f"{path.name}:0.5"]
    more = ["--report", "r.json", "--save-latents", "l.safetensors", "-o", "x.png"]
    ran = CliRunner().invoke(app, [*command, *more], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    report = json.loads((tmp_path / "r.json").read_text())
    (adapter,) = report["plan"]["workload"]["adapters"]
    assert (adapter["path"], adapter["scale"], adapter["matched"], adapter["unmatched"]) == (str(path), 0.5, 78, 1)
    assert any("blocks.7.attn.to_q.lora_A" in event for event in report["events"])
    said = f"all.safetensors ({adapter['fingerprint']}) at 0.5"
    picture = Image.open(tmp_path / "x.png")
    assert picture.text["lora"] == said
    assert read_latents(tmp_path / "l.safetensors").origin.request.loras == (Lora(str(path), 0.5),)

    (tmp_path / "plan.json").write_text(json.dumps(report["plan"]))
    again = ["generate", "--plan", "plan.json", "-p", "a dog", "-s", "1", "-o", "again.png"]
    replayed = CliRunner().invoke(app, [*again, "-m", folder], catch_exceptions=False)
    assert replayed.exit_code == 0, replayed.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(picture))

    path.unlink()  # latents need it no more
    decode = ["generate", "--from-latents", "l.safetensors", "-o", "decoded.png"]
    decoded = CliRunner().invoke(app, decode, catch_exceptions=False)
    assert decoded.exit_code == 0, decoded.output
    assert Image.open(tmp_path / "decoded.png").text["lora"] == said
