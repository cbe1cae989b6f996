"""Every form of checkpoint: made in its exact layout, recognised by content, run, equal to its decoded reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import single_files as forms
import tiny
import torch
from safetensors.torch import save_file

from lowmem_flux2 import Engine
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.runtime.checkpoint import TensorFile

ASKED: dict[str, Any] = {
    **{"height": 64, "width": 64, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0, "output_type": "latent"},
    "prompt_embeds": torch.randn(1, 64, 3 * tiny.HIDDEN, generator=torch.Generator().manual_seed(0)),
}


def latents(model: Path, weight_format: str, *, parts: Path | None = None, dtype: str = "fp32") -> torch.Tensor:
    """What a model makes of one prompt's embeddings; of a single file with the text encoder and VAE of ``parts``."""
    given = {} if parts is None else {"text_encoder": str(parts), "vae": str(parts)}
    engine = Engine(str(model), dtype=dtype, weight_format=weight_format, text_weight_format=dtype, **given)
    made: torch.Tensor = engine.generate(**ASKED).images
    return made


def check(file: Path, parts: Path, reference: Path, formats: tuple[str, ...] = ("fp32", "int8")) -> None:
    """The file's pictures are those of its decoded reference, unquantized and prepared."""
    for weight_format in formats:
        expected = latents(reference, weight_format)
        assert torch.isfinite(expected).all()
        assert torch.equal(latents(file, weight_format, parts=parts), expected)


# --- layouts --------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[forms.State], forms.State]] = {
    "bfl": forms.bfl_state,
    "comfyui": lambda state: forms.prefixed(forms.bfl_state(state)),
    "diffusers": lambda state: state,
}


@pytest.mark.parametrize("model", ["tiny_dev", "tiny_klein"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str, model: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    state = {name: tensor.bfloat16() for name, tensor in forms.transformer_state(folder).items()}
    save_file(LAYOUTS[layout](state), tmp_path / "any-name.safetensors")
    reference = forms.with_transformer(tmp_path / "reference", folder, state)
    source = resolve_model(str(tmp_path / "any-name.safetensors"), text_encoder=str(folder), vae=str(folder))
    assert source.spec.stored_dtype == "bf16"
    assert source.spec.transformer == resolve_model(str(folder)).spec.transformer
    check(tmp_path / "any-name.safetensors", folder, reference, ("fp32", "int8") if layout == "bfl" else ("fp32",))


@pytest.mark.parametrize("guidance", [False, True])
def test_rows_are_those_of_diffusers_converter(guidance: bool, tmp_path: Path) -> None:
    """Each stored tensor holds its own number and its rows' numbers, so that every row is known again."""
    state = tiny.make_transformer(guidance_embeds=guidance).state_dict()
    bfl = {
        name: (1000 * number + torch.arange(len(tensor))).float().view(-1, *[1] * (tensor.ndim - 1)).expand_as(tensor)
        for number, (name, tensor) in enumerate(forms.bfl_state(state).items())
    }
    save_file({name: tensor.contiguous() for name, tensor in bfl.items()}, tmp_path / "model.safetensors")
    expected = forms.diffusers_state(bfl)
    with TensorFile(tmp_path) as files:
        assert set(files.names()) == set(expected)
        for name, tensor in expected.items():
            found = torch.empty_like(tensor)
            files.read_into(name, found)
            assert torch.equal(found, tensor), name
            if tensor.ndim == 2:
                part = torch.empty(3, tensor.shape[1])
                files.read_rows_from(name, len(tensor) // 2 - 1, part)  # across the swapped halves of norm_out
                assert torch.equal(part, tensor[len(tensor) // 2 - 1 :][:3]), name
