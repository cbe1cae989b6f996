"""The configs of a text encoder or a VAE that is a single file, worked out from its header.

Widths come from the tensors' shapes; what shapes do not tell (rotary base, activation, epsilon, Mistral's head size) is
as in the released model's config, or as a GGUF file's header says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.gguf_header import head_dim_of
from lowmem_flux2.planning.models import OUT_LAYERS
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.stored import StoredTensor

_ENDING: Final = "layers.0.input_layernorm.weight"
_QWEN3: Final = ("flux2-klein-4b", "flux2-klein-9b")
_MISTRAL3: Final = ("flux2-dev",)
_LAYER: Final = re.compile(r"layers\.(\d+)\.input_layernorm\.weight$")
_FOREIGN: Final[Mapping[str, str]] = {
    "visual.": "a vision-language model (Qwen-VL), not Qwen3",
    "self_attn.q_proj.bias": "an encoder whose queries have biases (Qwen2 or another)",
    "pre_feedforward_layernorm": "a Gemma",
    "rope_freqs": "a Llama",
}
"""Text models that resemble those of FLUX.2, by a part of a tensor's name."""


def text_encoder_config(file: Path, view: Mapping[str, StoredTensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of a Qwen3 or a Mistral Small 3, with the layers that the pipelines use or more.

    Raises:
        CheckpointBroken: another text encoder, or none; says what was found.
    """
    found = next((name for name in view if name.endswith(_ENDING) and "vision" not in name), None)
    if found is None:
        raise CheckpointBroken(f"{file} holds no text encoder: no {_ENDING!r}; {_has(view)}")
    for mark, what in _FOREIGN.items():
        if any(mark in name for name in view):
            raise CheckpointBroken(f"{file} holds {what}; FLUX.2's text encoders are Qwen3 and Mistral Small 3")
    root = found.removesuffix(_ENDING)
    shape = _Shapes(file, view)
    vocab, hidden = shape.of(f"{root}embed_tokens.weight", 2)
    attention = f"{root}layers.0.self_attn."
    is_qwen3 = f"{attention}q_norm.weight" in view
    configs = [shipped_configs(name)["text_encoder"] for name in (_QWEN3 if is_qwen3 else _MISTRAL3)]
    texts = [config if is_qwen3 else config["text_config"] for config in configs]
    near = next((index for index, text in enumerate(texts) if text["hidden_size"] == hidden), 0)
    shipped, text = configs[near], dict(texts[near])
    head_dim = shape.of(f"{attention}q_norm.weight", 1)[0] if is_qwen3 else head_dim_of(metadata) or text["head_dim"]
    layers = 1 + max(int(layer[1]) for name in view if (layer := _LAYER.search(name)))
    needed = max(OUT_LAYERS["qwen3" if is_qwen3 else "mistral3"])
    if layers < needed:
        raise CheckpointBroken(f"{file}: its text encoder has {layers} layers, {needed} are needed")
    text |= {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": shape.of(f"{root}layers.0.mlp.gate_proj.weight", 2)[0],
        "head_dim": head_dim,
        "num_attention_heads": shape.of(f"{attention}q_proj.weight", 2)[0] // head_dim,
        "num_key_value_heads": shape.of(f"{attention}k_proj.weight", 2)[0] // head_dim,
        # Releases for FLUX.2 alone are cut off after the last layer that is used, whose output is then not normed.
        "num_hidden_layers": max(layers, text["num_hidden_layers"]),
    }
    text |= _stated(file, metadata)
    return text if is_qwen3 else {**shipped, "text_config": text}


def _stated(file: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF header says of the numbers that shapes do not tell.

    Raises:
        CheckpointBroken: rotary embedding scaled for long texts, which FLUX.2's text encoders are not.
    """
    architecture = metadata.get("general.architecture")
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointBroken(f"{file}: its rotary embedding is scaled ({scaling}), which no encoder of FLUX.2's is")
    keys = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
    stated = {ours: metadata.get(f"{architecture}.{theirs}") for ours, theirs in keys.items()}
    return {key: value for key, value in stated.items() if value is not None}


def vae_config(file: Path, view: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Of an AutoencoderKLFlux2.

    Raises:
        CheckpointBroken: another VAE, or none; says what was found.
    """
    shape = _Shapes(file, view)
    if "decoder.conv_in.weight" not in view:
        raise CheckpointBroken(f"{file} holds no VAE: no 'decoder.conv_in.weight'; {_has(view)}")
    if "bn.running_mean" not in view:
        raise CheckpointBroken(f"{file} holds a VAE without the batch norm that FLUX.2's has: of FLUX.1, it seems")
    encoder, decoder = (
        [shape.of(f"{half}.{level}.resnets.0.conv1.weight", 4)[0] for level in range(_count(view, half))]
        for half in ("encoder.down_blocks", "decoder.up_blocks")
    )
    config = {
        **shipped_configs("flux2-dev")["vae"],  # all releases have the same one
        "block_out_channels": encoder,
        "down_block_types": ["DownEncoderBlock2D"] * len(encoder),
        "up_block_types": ["UpDecoderBlock2D"] * len(encoder),
        "layers_per_block": _count(view, "encoder.down_blocks.0.resnets"),
        "latent_channels": shape.of("decoder.conv_in.weight", 4)[1],
        "in_channels": shape.of("encoder.conv_in.weight", 4)[1],
        "out_channels": shape.of("decoder.conv_out.weight", 4)[0],
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in view,
        "use_quant_conv": "quant_conv.weight" in view,
        "use_post_quant_conv": "post_quant_conv.weight" in view,
    }
    small = list(reversed(decoder))
    return config if small == encoder else {**config, "decoder_block_out_channels": small}


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow ``prefix`` in names."""
    numbered = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return 1 + max((int(number[1]) for name in names if (number := numbered.match(name))), default=-1)


class _Shapes:
    """Shapes by name; a tensor that is not there, or of other dimensions, is an error that names it."""

    def __init__(self, file: Path, view: Mapping[str, StoredTensor]) -> None:
        self._file, self._view = file, view

    def of(self, name: str, dimensions: int) -> tuple[int, ...]:
        tensor = self._view.get(name)
        if tensor is None or len(tensor.shape) != dimensions:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise CheckpointBroken(f"{self._file}: its tensor {name!r} is {found}")
        return tensor.shape


def _has(view: Mapping[str, StoredTensor]) -> str:
    return f"it has {', '.join(sorted(view)[:3]) or 'nothing'}, ..."
