"""The reference stage: pictures to packed latents, through the VAE's encoder alone, one picture a call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, Flux2Pipeline

from lowmem_flux2.errors import NonFiniteLatents
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import load_module, unbind
from lowmem_flux2.runtime.references import References
from lowmem_flux2.runtime.weights import Weights


class ReferenceEncoder:
    """The VAE's encoder of one checkpoint. The decoder is never read."""

    def __init__(
        self, folder: Path, model: ModelSpec, stage: StagePlan, device: torch.device, weights: Weights
    ) -> None:
        self._device = device
        self._dtype = DTYPES[stage.compute_dtype]
        config = AutoencoderKLFlux2.load_config(folder / "vae")
        with init_empty_weights(include_buffers=False):
            self._vae = AutoencoderKLFlux2.from_config(config).eval()
        parts = ["encoder", "bn"] + (["quant_conv"] if self._vae.quant_conv is not None else [])
        with closing(weights.open("vae")) as files:
            for name in parts:
                load_module(self._vae.get_submodule(name), f"{name}.", files, self._dtype, device)
        if stage.tile_px:
            self._vae.enable_tiling()
            self._vae.tile_sample_min_size = stage.tile_px
            self._vae.tile_latent_min_size = stage.tile_px // model.vae.spatial_factor

    @torch.no_grad()
    def encode(self, picture: torch.Tensor, number: int = 1) -> torch.Tensor:
        """One picture (height, width, 3) in 8 bits to folded, normalised latents, on the host.

        They are (1, channels, height / 16, width / 16). Equal to ``Flux2Pipeline._encode_vae_image``.

        Args:
            number: what to call it in messages.

        Raises:
            NonFiniteLatents: NaN or infinity came out.
        """
        moments = self._vae.encode(normalised(picture).to(self._device, self._dtype), return_dict=False)[0]
        latents: torch.Tensor = Flux2Pipeline._patchify_latents(moments.mode())
        norm = self._vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = norm.running_var.view(1, -1, 1, 1)
        deviation = torch.sqrt(variance + self._vae.config.batch_norm_eps).to(latents.device, latents.dtype)
        latents = ((latents - mean) / deviation).to("cpu")
        if not bool(torch.isfinite(latents).all()):
            hint = "try --dtype fp32" if latents.dtype is torch.float16 else "the VAE's weights may be broken"
            raise NonFiniteLatents(f"reference: NaN or infinity in the latents of reference image {number}; {hint}")
        return latents

    def close(self) -> None:
        unbind(self._vae)


def normalised(picture: torch.Tensor) -> torch.Tensor:
    """A picture (height, width, 3) in 8 bits as the stock image processor hands it over: (1, 3, height, width) in
    [-1, 1], fp32, channels last in memory, as that decides which convolution kernel runs."""
    values = picture.unsqueeze(0).to(torch.float32).div_(255.0)
    return values.permute(0, 3, 1, 2).mul_(2.0).sub_(1.0)


def joined(latents: Sequence[torch.Tensor]) -> References:
    """The latents of all pictures, (1, channels, rows, columns) each, packed into one sequence with its positions.

    A picture's place in the sequence is its time coordinate, so that their order counts.
    """
    packed = [Flux2Pipeline._pack_latents(one).squeeze(0) for one in latents]
    return References(torch.cat(packed).unsqueeze(0), Flux2Pipeline._prepare_image_ids(list(latents)))
