"""The modules of a checkpoint on the meta device, and the stored-name prefix of each of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel
from torch import nn
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.mixed import mixed_bits
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.layout import BlockSource, CheckpointBlock, layout_of
from lowmem_flux2.runtime.quantize import convert, linears_of


@dataclass(frozen=True, slots=True)
class Blocks:
    """The streamable blocks of a component, on the meta device, in the order of use."""

    modules: tuple[nn.Module, ...]
    prefixes: tuple[str, ...]

    def converted(self, weight_format: str, dtype: torch.dtype) -> Blocks:
        """The same blocks with their Linears replaced by those of a quantized format, in place."""
        linears = [dict(linears_of(module)) for module in self.modules]
        weights = [{name: linear.weight.numel() for name, linear in each.items()} for each in linears]
        for module, bits in zip(self.modules, mixed_bits(weights), strict=True):
            convert(module, weight_format, dtype, bits)
        return self

    def sources(self, files: Tensors, dtype: torch.dtype) -> list[BlockSource]:
        """Each block straight from the checkpoint's files, unquantized."""
        return [
            CheckpointBlock(layout_of(module, prefix, dtype), files)
            for module, prefix in zip(self.modules, self.prefixes, strict=True)
        ]


def transformer_on_meta(folder: Path) -> Any:
    """Flux2Transformer2DModel of ``folder`` with its weights on the meta device."""
    config = Flux2Transformer2DModel.load_config(folder)
    with init_empty_weights(include_buffers=False):
        return Flux2Transformer2DModel.from_config(config).eval()


def transformer_blocks(net: Any) -> Blocks:
    """Double-stream blocks, then single-stream ones."""
    doubles, singles = net.transformer_blocks, net.single_transformer_blocks
    prefixes = [f"transformer_blocks.{index}." for index in range(len(doubles))]
    prefixes += [f"single_transformer_blocks.{index}." for index in range(len(singles))]
    return Blocks((*doubles, *singles), tuple(prefixes))


def text_decoder_on_meta(folder: Path, model: ModelSpec, layers: int | None = None) -> Any:
    """The inner decoder with so many layers, by default the used ones, weights on the meta device, rotary tables
    real."""
    if model.form == "dev":
        from transformers import MistralModel as Decoder
    else:
        from transformers import Qwen3Model as Decoder
    config = AutoConfig.from_pretrained(folder).get_text_config()
    used = model.text_encoder.layers_used if layers is None else layers
    config.num_hidden_layers = used
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:used]
    with init_empty_weights(include_buffers=False), no_init_weights():
        decoder = Decoder(config)
    return decoder.eval()


def text_decoder_root(files: Tensors) -> str:
    """What precedes ``layers.0.`` in the stored names: releases of transformers nest the decoder differently."""
    ending = "layers.0.input_layernorm.weight"
    for name in files.names():
        if name.endswith(ending) and "vision" not in name:
            return name.removesuffix(ending)
    raise CheckpointBroken(f"{files.folder}: no decoder layers: no tensor name ends in {ending!r}")


def text_decoder_blocks(decoder: Any, root: str) -> Blocks:
    """The used layers."""
    layers = tuple(decoder.layers)
    return Blocks(layers, tuple(f"{root}layers.{index}." for index in range(len(layers))))
