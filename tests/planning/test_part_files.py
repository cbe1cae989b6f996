"""Text encoders and VAEs as single files: known by their headers, or refused with what was found."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from sparse import Shapes, bfl_shapes, encoder_shapes, write
from typer.testing import CliRunner

from lowmem_flux2.cli import app
from lowmem_flux2.errors import CheckpointBroken, DoesNotFit, UsageError
from lowmem_flux2.planning.encoder_layouts import encoder_tensor
from lowmem_flux2.planning.headers import read_header
from lowmem_flux2.planning.part_file import text_encoder_config, vae_config
from lowmem_flux2.planning.sources import resolve_model, shipped_configs
from lowmem_flux2.planning.stored import model_view

RELEASED = {"flux2-dev": 30, "flux2-klein-4b": 36, "flux2-klein-9b": 36}
"""Layers in ComfyUI's file of each text encoder."""


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@cache
def encoder_of(name: str) -> Shapes:
    return encoder_shapes(resolve_model(name, offline=True).spec.text_encoder, RELEASED[name])


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_encoder_has_its_own_config(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", encoder_of(name))
    assert text_encoder_config(file, model_view([read_header(file)]), {}) == shipped_configs(name)["text_encoder"]


def test_a_released_vae_has_its_own_config(tmp_path: Path) -> None:
    import part_files
    import torch
    from diffusers import AutoencoderKLFlux2

    shipped = shipped_configs("flux2-dev")["vae"]
    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(shipped)
    shapes = {part_files.bfl_vae_name(name, 4): tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    file = write(tmp_path / "ae.safetensors", shapes)
    assert vae_config(file, model_view([read_header(file)])) == shipped
    file = write(tmp_path / "all.safetensors", shapes, prefix="first_stage_model.")
    assert vae_config(file, model_view([read_header(file)])) == shipped


def test_a_single_file_of_each(tmp_path: Path) -> None:
    """The tokenizer is the released model's, which is still to be fetched."""
    spec = resolve_model("flux2-klein-9b", offline=True).spec
    file = write(tmp_path / "nine.safetensors", bfl_shapes(spec.transformer))
    encoder = write(tmp_path / "qwen_3_8b.safetensors", encoder_of("flux2-klein-9b"))
    found = resolve_model(str(file), text_encoder=str(encoder), offline=True)
    assert found.spec.text_encoder == spec.text_encoder
    assert found.single is not None
    repo_id = "black-forest-labs/FLUX.2-klein-9B"
    assert {(each.repo_id, each.part) for each in found.single.missing} == {(repo_id, "tokenizer"), (repo_id, "vae")}
    base = resolve_model(str(file), text_encoder=str(encoder), tokenizer="flux2-klein-base-9b", offline=True)
    assert (found.spec.is_distilled, base.spec.is_distilled) == (True, False)


def test_what_would_fit_names_the_tokenizer(tmp_path: Path) -> None:
    """Without it a base model would be planned as the distilled one."""
    spec = resolve_model("flux2-klein-4b", offline=True).spec
    file = write(tmp_path / "four.safetensors", bfl_shapes(spec.transformer))
    encoder = write(tmp_path / "qwen_3_4b.safetensors", encoder_of("flux2-klein-4b"))
    typed = ["plan", "-m", str(file), "--text-encoder", str(encoder), "--tokenizer", "flux2-klein-base-4b"]
    refused = CliRunner().invoke(app, [*typed, "--profile", "rtx-3060-12gb", "--max-ram", "900MiB", "--offline"])
    assert isinstance(refused.exception, DoesNotFit)
    assert "--tokenizer flux2-klein-base-4b" in refused.exception.closest[0]


def test_encoders_of_other_models_are_refused_by_width(tmp_path: Path) -> None:
    spec = resolve_model("flux2-klein-9b", offline=True).spec
    file = write(tmp_path / "nine.safetensors", bfl_shapes(spec.transformer))
    small = write(tmp_path / "qwen_3_4b.safetensors", encoder_of("flux2-klein-4b"))
    with pytest.raises(CheckpointBroken) as caught:
        resolve_model(str(file), text_encoder=str(small), offline=True)
    for told in (str(file), f"--text-encoder {small}", "klein-4B's Qwen3-4B encoder", "klein-9B's", "12288"):
        assert told in str(caught.value)
    mistral = write(tmp_path / "mistral.safetensors", encoder_of("flux2-dev"))
    with pytest.raises(CheckpointBroken, match="the text encoder is 'mistral3', a klein pipeline needs 'qwen3'"):
        resolve_model(str(file), text_encoder=str(mistral), offline=True)


LAYER = "model.layers.0."
FOREIGN: dict[str, tuple[Shapes, str]] = {
    "a transformer": ({"img_in.weight": (64, 32)}, "holds no text encoder: .*; it has x_embedder.weight"),
    "Qwen3-VL": (
        {f"{LAYER}input_layernorm.weight": (4,), "visual.blocks.0.norm1.weight": (4,)},
        r"holds a vision-language model \(Qwen-VL\), not Qwen3",
    ),
    "Qwen2": ({f"{LAYER}input_layernorm.weight": (4,), f"{LAYER}self_attn.q_proj.bias": (4,)}, "have biases"),
    "Gemma": ({f"{LAYER}input_layernorm.weight": (4,), f"{LAYER}pre_feedforward_layernorm.weight": (4,)}, "a Gemma"),
    "few layers": (
        {
            "model.embed_tokens.weight": (8, 4),
            f"{LAYER}input_layernorm.weight": (4,),
            f"{LAYER}self_attn.q_norm.weight": (2,),
        },
        "its text encoder has 1 layers, 27 are needed",
    ),
    "no embedding": ({f"{LAYER}input_layernorm.weight": (4,)}, r"its tensor 'model\.embed_tokens\.weight' is missing"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_text_encoders_are_refused(case: str, tmp_path: Path, tiny_klein: Path) -> None:
    file = write(tmp_path / "x.safetensors", bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer))
    shapes, told = FOREIGN[case]
    encoder = write(tmp_path / "encoder.safetensors", shapes)
    with pytest.raises(CheckpointBroken, match=told):
        resolve_model(str(file), text_encoder=str(encoder), vae=str(tiny_klein), offline=True)


def test_a_vae_of_flux1_is_refused(tmp_path: Path, tiny_klein: Path) -> None:
    file = write(tmp_path / "x.safetensors", bfl_shapes(resolve_model(str(tiny_klein)).spec.transformer))
    vae = write(tmp_path / "ae.safetensors", {"decoder.conv_in.weight": (8, 4, 3, 3)})
    with pytest.raises(CheckpointBroken, match=r"without the batch norm .* of FLUX\.1, it seems"):
        resolve_model(str(file), text_encoder=str(tiny_klein), vae=str(vae), offline=True)


def test_where_a_tokenizer_comes_from(tmp_path: Path, tiny_klein: Path, tiny_dev: Path) -> None:
    spec = resolve_model(str(tiny_klein)).spec
    file = write(tmp_path / "x.safetensors", bfl_shapes(spec.transformer))
    (tmp_path / "encoder").mkdir()
    encoder = write(tmp_path / "encoder" / "e.safetensors", encoder_shapes(spec.text_encoder, 27))
    given = {"text_encoder": str(encoder), "vae": str(tiny_klein)}
    with pytest.raises(UsageError, match=r"is a file without a tokenizer beside it, .* with --tokenizer"):
        resolve_model(str(file), **given)
    with pytest.raises(UsageError, match="is a file: give the folder that it is in"):
        resolve_model(str(file), **given, tokenizer=str(tiny_klein / "tokenizer" / "tokenizer.json"))
    with pytest.raises(CheckpointBroken, match=r"is of another text encoder: it has no '<\|im_start\|>'"):
        resolve_model(str(file), **given, tokenizer=str(tiny_dev))
    found = resolve_model(str(file), **given, tokenizer=str(tiny_klein))
    assert found.folder is not None
    assert (found.folder / "tokenizer").resolve() == tiny_klein / "tokenizer"
    assert not found.spec.is_distilled, "as the folder of the tokenizer says"
    for path in (tiny_klein / "tokenizer").iterdir():
        (encoder.parent / path.name).write_bytes(path.read_bytes())
    found = resolve_model(str(file), **given)
    assert found.folder is not None
    assert (found.folder / "tokenizer").resolve() == encoder.parent
    assert found.spec.is_distilled
    with pytest.raises(UsageError, match="--tokenizer go with a model that is a single file"):
        resolve_model(str(tiny_klein), tokenizer=str(tiny_klein))


def test_names_that_llama_cpp_has_and_no_encoder_here() -> None:
    assert encoder_tensor("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert encoder_tensor("rope_freqs.weight") is None
    assert encoder_tensor("blk.3.ffn_gate_inp.weight") is None
