"""What can be asked for together gives the same latents wherever the blocks are, and in chunks of tokens or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import loras
import pytest
import single_files
import tiny
import torch
from PIL import Image

from lowmem_flux2 import Engine, Generation
from lowmem_flux2.planning.plan import Placement, Plan
from lowmem_flux2.runtime.reference_images import pictures_of, prepare_references

TAYLOR, FIRST_BLOCK = "taylor:interval=3,warmup=2", "first-block:threshold=1.0,warmup=1"
SIZE: dict[str, Any] = {"height": 128, "width": 144, "num_inference_steps": 5, "guidance_scale": 4.0}
SIGMAS = [0.9, 0.89, 0.88, 0.6, 0.1]
"""Near each other, so that a step cache skips some: what random weights compute changes a lot."""
CHUNK_TOKENS = 64
"""72 image tokens and 64 of text are 136: two chunks; with 48 of references, 184."""


@dataclass(frozen=True)
class Case:
    """What is asked for together."""

    form: str = "klein"
    weights: str = "fp32"
    lora: bool = False
    references: bool = False
    step_cache: str = "off"
    images: int = 1


PICTURES = [Image.radial_gradient("L").resize((128, 64)), Image.linear_gradient("L").resize((64, 64))]

CASES = {
    "lora": Case(lora=True),
    "lora, taylor": Case(lora=True, step_cache=TAYLOR),
    "lora, first block, int8": Case(lora=True, step_cache=FIRST_BLOCK, weights="int8"),
    "lora, gguf": Case(form="gguf", lora=True, weights="gguf"),
    "lora, w8a8": Case(form="dev", lora=True, weights="w8a8"),
    "references": Case(references=True, images=2),
    "references, taylor, w8a8": Case(references=True, step_cache=TAYLOR, weights="w8a8"),
    "references, first block": Case(form="dev", references=True, step_cache=FIRST_BLOCK, images=2),
    "references, taylor, gguf": Case(form="gguf", references=True, step_cache=TAYLOR, weights="gguf"),
    "all": Case(form="dev", lora=True, references=True, step_cache=FIRST_BLOCK, weights="int4", images=2),
}


@dataclass(frozen=True)
class Model:
    """What an engine takes, and a LoRA for it."""

    arguments: Mapping[str, Any]
    lora: Path


@pytest.fixture(scope="module")
def models(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = tmp_path_factory.mktemp("combinations")
    wide = single_files.write_wide(made / "wide", folders["klein"])
    bfl = single_files.bfl_state(single_files.transformer_state(wide))
    single_files.write_gguf(made / "x.gguf", bfl, "Q4_K", "Q8_0", "F16")
    arguments = {
        "klein": {"model": str(folders["klein"])},
        "dev": {"model": str(folders["dev"])},
        "gguf": {"model": str(made / "x.gguf"), "text_encoder": str(wide), "vae": str(wide)},
    }
    found = {}
    for form, given in arguments.items():
        dims = Engine(**given).source.spec.transformer
        keys = loras.diffusers_keys(loras.factors(dims, size=0.3))
        found[form] = Model(given, loras.write(made / f"{form}.safetensors", keys))
    return found


def placed(plan: Plan, placements: tuple[Placement, ...], chunk_tokens: int) -> Plan:
    denoise = plan.stage("denoise")
    count = len(denoise.block_placements)
    slots = 0 if set(placements) == {Placement.GPU} else 2
    blocks = (placements * count)[:count]
    stage = replace(
        denoise, block_placements=blocks, slots=slots, prefetch_depth=max(slots - 1, 0), chunk_tokens=chunk_tokens
    )
    return replace(plan, stages=tuple(stage if one.stage == "denoise" else one for one in plan.stages))


def made(model: Model, case: Case, placements: tuple[Placement, ...], cache: Path, chunk_tokens: int = 0) -> Generation:
    engine = Engine(
        **model.arguments,
        dtype="fp32",
        weight_format=case.weights,
        text_weight_format="fp32",
        step_cache=case.step_cache,
        batch_size=case.images,
        cache_dir=cache,
        loras=[(model.lora, 0.7)] if case.lora else [],
    )
    embeds = torch.randn(1, 64, 3 * tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {**SIZE, "prompt_embeds": embeds, "num_images_per_prompt": case.images, "seed": 1}
    if case.form != "dev":
        asked["negative_prompt_embeds"] = -embeds
    if case.references:
        asked["image"] = PICTURES
    asked |= {"sigmas": SIGMAS, "output_type": "latent"}
    references, _ = prepare_references(pictures_of(asked["image"]) if case.references else None, 16, None)
    request = engine.request(
        "x", **SIZE, num_images_per_prompt=case.images, max_sequence_length=64, references=references
    )
    return engine.generate(**asked, plan=placed(engine.plan(request), placements, chunk_tokens))


@pytest.mark.parametrize("name", CASES)
def test_no_place_and_no_chunk_changes_a_bit(name: str, models: dict[str, Model], tmp_path: Path) -> None:
    case = CASES[name]
    model = models[case.form]
    resident = made(model, case, (Placement.GPU,), tmp_path)
    streamed = made(model, case, (Placement.DISK, Placement.PAGEABLE, Placement.GPU), tmp_path)
    chunked = made(model, case, (Placement.PINNED, Placement.DISK), tmp_path, CHUNK_TOKENS)
    assert torch.isfinite(resident.images).all()
    assert torch.equal(resident.images, streamed.images)
    assert torch.equal(resident.images, chunked.images)
    if case.step_cache != "off":
        (skipped,) = next(each for each in resident.report.stages if each.stage == "denoise").skipped_steps
        assert skipped
    for what in ("lora", "references"):  # each has its part in it
        if getattr(case, what):
            without = made(model, replace(case, **{what: False}), (Placement.GPU,), tmp_path)
            assert not torch.equal(resident.images, without.images)
