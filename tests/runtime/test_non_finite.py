"""NaN stops the run and is traced to where it began, instead of becoming a black picture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowmem_flux2 import Engine
from lowmem_flux2.errors import DecodeFailed, NonFiniteLatents

ASKED: dict[str, Any] = {
    "prompt": "a red circle",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
    "output_type": "latent",
    "seed": 0,
}


def poisoned(folder: Path, copy: Path, tensor: str, component: str = "transformer") -> Path:
    """A copy of a checkpoint with one NaN in a tensor."""
    shutil.copytree(folder, copy)
    path = copy / component / "diffusion_pytorch_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    weights[tensor].view(-1)[0] = torch.nan
    save_file(weights, path)
    return copy


@pytest.mark.parametrize(
    ("tensor", "where"),
    [
        ("transformer_blocks.0.attn.to_q.weight", "double-stream block 0"),
        ("transformer_blocks.1.ff.linear_out.weight", "double-stream block 1"),
        ("transformer_blocks.0.ff_context.linear_out.weight", "double-stream block 0"),  # the text stream
        ("transformer_blocks.1.ff_context.linear_out.weight", "double-stream block 1"),
        ("single_transformer_blocks.0.attn.to_out.weight", "single-stream block 0"),
        ("single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight", "single-stream block 2"),
        ("context_embedder.weight", "the projected text embeddings"),
        ("double_stream_modulation_img.linear.weight", "the timestep conditioning"),
        ("x_embedder.weight", "the latents' projection"),
        ("proj_out.weight", "the output projection"),
    ],
)
@pytest.mark.parametrize("placement", ["resident", "disk"])
def test_names_where_nan_begins(tensor: str, where: str, placement: Any, tiny_klein: Path, tmp_path: Path) -> None:
    engine = Engine(str(poisoned(tiny_klein, tmp_path / "model", tensor)), dtype="fp32", placement=placement)
    with pytest.raises(NonFiniteLatents, match=rf"step 1 of 2, first in {where};") as caught:
        engine.generate(**ASKED)
    assert caught.value.exit_code == 5


def test_names_the_block_of_dev_too(tiny_dev: Path, tmp_path: Path) -> None:
    folder = poisoned(tiny_dev, tmp_path / "model", "single_transformer_blocks.1.attn.to_out.weight")
    with pytest.raises(NonFiniteLatents, match="first in single-stream block 1;"):
        Engine(str(folder), dtype="bf16").generate(**ASKED)


def test_blames_the_callback_for_its_nan(tiny_klein: Path) -> None:
    def spoil(_: object, step: int, __: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": tensors["latents"] * (torch.nan if step == 0 else 1)}

    with pytest.raises(NonFiniteLatents, match="step 2 of 2, first in the latents that it was given"):
        Engine(str(tiny_klein), dtype="fp32").generate(**ASKED, callback_on_step_end=spoil)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_picture_of_nan_is_never_returned(output_type: str, tiny_klein: Path, tmp_path: Path) -> None:
    folder = poisoned(tiny_klein, tmp_path / "model", "decoder.conv_out.weight", "vae")
    with pytest.raises(DecodeFailed, match="decode: NaN or infinity in the picture") as failed:
        Engine(str(folder), dtype="fp32").generate(**{**ASKED, "output_type": output_type})
    assert isinstance(failed.value.__cause__, NonFiniteLatents)  # the latents are whole, and kept
