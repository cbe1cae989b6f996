"""The decode stage: packed latents to pictures, through the VAE's decoder alone, one image a call."""

from __future__ import annotations

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
from lowmem_flux2.runtime.weights import Weights


class Decoder:
    """The VAE's decoder of one checkpoint. The encoder is never read."""

    def __init__(
        self, folder: Path, model: ModelSpec, stage: StagePlan, device: torch.device, weights: Weights
    ) -> None:
        self._device = device
        dtype = DTYPES[stage.compute_dtype]
        config = AutoencoderKLFlux2.load_config(folder / "vae")
        with init_empty_weights(include_buffers=False):
            self._vae = AutoencoderKLFlux2.from_config(config).eval()
        parts = ["decoder", "bn"] + (["post_quant_conv"] if self._vae.post_quant_conv is not None else [])
        with closing(weights.open("vae")) as files:
            for name in parts:
                load_module(self._vae.get_submodule(name), f"{name}.", files, dtype, device)
        if stage.tile_px:
            self._vae.enable_tiling()
            self._vae.tile_sample_min_size = stage.tile_px
            self._vae.tile_latent_min_size = stage.tile_px // model.vae.spatial_factor

    @torch.no_grad()
    def unpack(self, packed: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Packed latents (images, tokens, channels) to VAE latents (images, latent_channels, height / 8, width / 8).

        Undoes packing, the batch norm and the 2x2 patches, as the pipelines do before ``vae.decode``. ``height`` and
        ``width`` count tokens.
        """
        packed = packed.to(self._device)
        images, _, channels = packed.shape
        latents = packed.permute(0, 2, 1).reshape(images, channels, height, width)
        norm = self._vae.bn
        mean = norm.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = norm.running_var.view(1, -1, 1, 1)
        deviation = torch.sqrt(variance + self._vae.config.batch_norm_eps).to(latents.device, latents.dtype)
        unpatched: torch.Tensor = Flux2Pipeline._unpatchify_latents(latents * deviation + mean)
        return unpatched

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents of one image (1, channels, height, width) to its picture (1, 3, height, width), on the host.

        Values are in about [-1, 1].

        Raises:
            NonFiniteLatents: the picture came out with NaN or infinity, which would be saved as black.
        """
        picture: torch.Tensor = self._vae.decode(latents.to(self._device), return_dict=False)[0].to("cpu")
        if not bool(torch.isfinite(picture).all()):
            hint = "try --dtype fp32" if picture.dtype is torch.float16 else "the VAE's weights may be broken"
            raise NonFiniteLatents(f"decode: NaN or infinity in the picture; {hint}")
        return picture

    def close(self) -> None:
        unbind(self._vae)
