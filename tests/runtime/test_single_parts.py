"""Text encoders and VAEs that are single files: run, and equal to their decoded references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import part_files as parts
import pytest
import single_files as forms
import tiny
import torch
from safetensors.torch import save_file

from lowmem_flux2 import Engine
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import text_decoder_blocks, text_decoder_on_meta
from lowmem_flux2.runtime.packed import packed_sources

ASKED: dict[str, Any] = {
    **{"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0},
    **{"max_sequence_length": 64, "output_type": "latent"},
}
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tiny_dev: Path, tiny_klein: Path) -> Folders:
    """Tiny folders with such text encoders, and with their transformer as a file beside them."""
    root, made = tmp_path_factory.mktemp("encoders"), {}
    for form, source in (("dev", tiny_dev), ("klein", tiny_klein)):
        made[form] = parts.write_encoder(root / form, source)
        save_file(forms.bfl_state(forms.transformer_state(source)), root / f"{form}.safetensors")
    return made.__getitem__


def made_by(model: Path, text_weight_format: str = "fp32", **given: Any) -> Any:
    engine = Engine(
        str(model),
        dtype="fp32",
        weight_format="fp32",
        text_weight_format=text_weight_format,
        **{name: str(value) for name, value in given.items()},
    )
    return engine.generate(**ASKED).images


def check(encoder: Path, folder: Path, reference: Path, *formats: str) -> None:
    """The file's latents are those of its decoded reference."""
    expected = {name: made_by(reference, name) for name in ("fp32", "int8")}
    assert torch.isfinite(expected["fp32"]).all()
    for name in formats:
        found = made_by(
            folder.with_suffix(".safetensors"), name, text_encoder=encoder, vae=folder, tokenizer=folder / "tokenizer"
        )
        assert torch.equal(found, expected.get(name, expected["fp32"]))


@pytest.mark.parametrize("form", ["dev", "klein"])
@pytest.mark.parametrize("layout", parts.ENCODERS)
def test_text_encoder(layout: str, form: str, tmp_path: Path, folder_of: Folders) -> None:
    folder = folder_of(form)
    stored, decoded = parts.ENCODERS[layout](folder)
    save_file(stored, tmp_path / "any-name.safetensors")
    reference = parts.with_encoder(tmp_path / "reference", folder, decoded)
    check(tmp_path / "any-name.safetensors", folder, reference, "fp32", *(["int8"] if layout == "fp8" else []))


@pytest.mark.parametrize(
    ("form", "architecture", "kind"),
    [
        ("klein", "qwen3", "Q8_0"),
        ("dev", "llama", "Q4_0"),
        ("dev", "mistral3", "F16"),
    ],
)
def test_gguf_text_encoder(form: str, architecture: str, kind: str, tmp_path: Path, folder_of: Folders) -> None:
    """Decoded, prepared in int8, and streamed as it is in the file: each byte is planned."""
    folder = folder_of(form)
    decoded = parts.write_gguf_encoder(tmp_path / "x.gguf", folder, kind, architecture)
    reference = parts.with_encoder(tmp_path / "reference", folder, decoded)
    check(tmp_path / "x.gguf", folder, reference, "fp32", *(["int8", "gguf"] if kind != "F16" else []))
    source = resolve_model(
        str(folder.with_suffix(".safetensors")),
        text_encoder=str(tmp_path / "x.gguf"),
        vae=str(folder),
        tokenizer=str(folder),
    )
    assert source.folder is not None
    assert bool(source.spec.text_encoder.packed) == (kind != "F16")
    if kind == "F16":
        return
    blocks = text_decoder_blocks(text_decoder_on_meta(source.folder / "text_encoder", source.spec), "model.")
    with TensorFile(source.folder / "text_encoder") as files:
        made = packed_sources(blocks, files, torch.float32)
    assert [each.layout.total_bytes for each in made] == block_sizes(
        StagePlan.bare("encode", "gguf", "fp32"), source.spec
    )


def test_any_rows_of_turned_ones(tmp_path: Path, folder_of: Folders) -> None:
    folder = folder_of("dev")
    decoded = parts.write_gguf_encoder(tmp_path / "model.gguf", folder, "Q8_0", "llama")
    name = "model.layers.3.self_attn.q_proj.weight"
    with TensorFile(tmp_path) as files:
        for first, count in ((0, 256), (1, 1), (60, 10), (100, 100)):
            part = torch.empty(count, tiny.HIDDEN)
            files.read_rows_from(name, first, part)
            assert torch.equal(part, decoded[name][first : first + count])


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_vae(layout: str, tmp_path: Path, tiny_klein: Path) -> None:
    folder = parts.write_vae(tmp_path / "klein", tiny_klein)
    save_file(forms.bfl_state(forms.transformer_state(folder)), tmp_path / "klein.safetensors")
    state = parts.vae_state(folder)
    save_file(parts.bfl_vae_state(state) if layout == "bfl" else state, tmp_path / "vae.safetensors")
    image = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    asked = {**ASKED, "output_type": "np", "image": image}
    pictures = [
        Engine(str(model), dtype="fp32", weight_format="fp32", text_weight_format="fp32", **given)
        .generate(**asked)
        .images
        for model, given in (
            (folder, {}),
            (tmp_path / "klein.safetensors", {"text_encoder": str(folder), "vae": str(tmp_path / "vae.safetensors")}),
        )
    ]
    assert np.array_equal(*pictures)
