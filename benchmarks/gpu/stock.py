"""diffusers' own pipelines with the same made-up weights, for the peers: what users without us would run."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Pipeline
from torch import nn
from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM
from transformers.initialization import no_init_weights

from gpu.generated import Pieces
from gpu.subjects import Subject
from lowmem_flux2.runtime.components import transformer_blocks, transformer_on_meta
from lowmem_flux2.runtime.stored_linear import StoredLinear


def klein_pipeline(model: Subject, pieces: Pieces, dtype: torch.dtype) -> Any:
    """The whole pipeline in RAM: full text encoder, transformer, VAE, all in ``dtype``."""
    with init_empty_weights(include_buffers=False), no_init_weights():
        encoder = Qwen3ForCausalLM(AutoConfig.from_pretrained(model.folder / "text_encoder")).eval()
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(model.folder / "vae")).eval()
    transformer = transformer_on_meta(model.folder / "transformer")
    for part in (encoder, transformer, vae):
        materialize(part, pieces, dtype)
    encoder.tie_weights()
    vae.bn.to(dtype)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(model.folder / "scheduler"),
        vae=vae,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(model.folder / "tokenizer", local_files_only=True),
        transformer=transformer,
        is_distilled=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def dev_pipeline(model: Subject, pieces: Pieces, dtype: torch.dtype, weight_format: str) -> Any:
    """dev's transformer alone, its blocks in a quantized format, for prompt embeddings and latent output."""
    transformer = transformer_on_meta(model.folder / "transformer")
    transformer_blocks(transformer).converted(weight_format, dtype)
    materialize(transformer, pieces, dtype)
    pipeline = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(model.folder / "scheduler"),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def materialize(module: nn.Module, pieces: Pieces, dtype: torch.dtype) -> None:
    """Fill every parameter in RAM by its name, as the streamed blocks are filled.

    Storage tensors of a quantized Linear become parameters: diffusers' group offload brings a group's buffers to the
    device and never back.
    """
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(owner, StoredLinear):
            piece = pieces.get(owner.format_name, owner.in_features, dtype)
            for leaf, buffer in list(owner._buffers.items()):
                assert buffer is not None
                made = torch.empty(buffer.shape, dtype=buffer.dtype)
                piece.fill(leaf, path, made)
                del owner._buffers[leaf]
                owner._parameters[leaf] = nn.Parameter(made, requires_grad=False)
            continue
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype)
                pieces.fill_plain(prefix + leaf, made)
                owner._parameters[leaf] = nn.Parameter(made, requires_grad=False)
