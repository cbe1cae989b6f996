"""What lies beside blocks takes the bytes that planning counts, and a bounded padding."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2
from torch import nn

from lowmem_flux2.planning.formats import FORMATS, PADDING_BESIDE_BLOCKS_BYTES, SECTOR_BYTES
from lowmem_flux2.planning.linears import CONDITIONING
from lowmem_flux2.planning.sources import ASSETS, resolve_model
from lowmem_flux2.runtime.components import transformer_on_meta
from lowmem_flux2.runtime.denoise import EVERY_STEP
from lowmem_flux2.runtime.layout import layout_of


@pytest.mark.parametrize("name", ["flux2-dev", "flux2-klein-4b"])
def test_padding_beside_blocks_is_bounded(name: str) -> None:
    spec, folder = resolve_model(name, offline=True).spec, ASSETS / "configs" / name
    net = transformer_on_meta(folder / "transformer")
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(folder / "vae"))
    parts: list[tuple[list[nn.Module], int]] = [
        ([net.get_submodule(part) for part in EVERY_STEP], spec.transformer.remaining_non_block_weights),
        ([net.get_submodule(part) for part in CONDITIONING], spec.transformer.conditioning_weights),
        ([vae.decoder, vae.bn, vae.post_quant_conv], spec.vae.decoder_weights),
        ([vae.encoder, vae.bn, vae.quant_conv], spec.vae.encoder_weights),
    ]
    for modules, weights in parts:
        spans = [layout_of(module, "", torch.bfloat16).total_bytes + SECTOR_BYTES for module in modules]
        assert 0 <= sum(spans) - FORMATS["bf16"].plain_bytes(weights) <= PADDING_BESIDE_BLOCKS_BYTES
