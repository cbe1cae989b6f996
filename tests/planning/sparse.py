"""Full-size checkpoints that take no room: safetensors files of zeros, sparse on the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from lowmem_flux2.planning.models import TextEncoderSpec, TransformerSpec

Shapes = dict[str, tuple[int, ...]]


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", prefix: str = "") -> Path:
    """A safetensors file of these tensors, all zero: sparse, so that a full-size one takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = prod(shape) * {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
        header[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def bfl_shapes(spec: TransformerSpec) -> Shapes:
    """Names and shapes of BFL's layout."""
    h, m, d = spec.hidden_size, spec.mlp_size, spec.head_dim
    embedders = ("time_in", "guidance_in") if spec.guidance_embeds else ("time_in",)
    shapes: Shapes = {"img_in.weight": (h, spec.in_channels), "txt_in.weight": (h, spec.joint_dim)}
    for name in embedders:
        shapes |= {f"{name}.in_layer.weight": (h, spec.timestep_channels), f"{name}.out_layer.weight": (h, h)}
    for stream, parts in (("double_stream_modulation_img", 6), ("double_stream_modulation_txt", 6)):
        shapes[f"{stream}.lin.weight"] = (parts * h, h)
    shapes["single_stream_modulation.lin.weight"] = (3 * h, h)
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * h, h)
    shapes["final_layer.linear.weight"] = (spec.out_channels, h)
    for block in range(spec.num_double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            shapes |= {f"{name}_attn.qkv.weight": (3 * h, h), f"{name}_attn.proj.weight": (h, h)}
            shapes |= {f"{name}_mlp.0.weight": (2 * m, h), f"{name}_mlp.2.weight": (h, m)}
            shapes |= {f"{name}_attn.norm.{part}_norm.scale": (d,) for part in ("query", "key")}
    for block in range(spec.num_single):
        name = f"single_blocks.{block}"
        shapes |= {f"{name}.linear1.weight": (3 * h + 2 * m, h), f"{name}.linear2.weight": (h, h + m)}
        shapes |= {f"{name}.norm.{part}_norm.scale": (d,) for part in ("query", "key")}
    return shapes


def encoder_shapes(spec: TextEncoderSpec, layers: int) -> Shapes:
    """Names and shapes of so many layers as ComfyUI's files have them."""
    h, m, d = spec.hidden_size, spec.intermediate_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    shapes: Shapes = {"model.embed_tokens.weight": (spec.vocab_size, h)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (rows, h) for part, rows in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"{name}.self_attn.o_proj.weight": (h, q), f"{name}.mlp.down_proj.weight": (h, m)}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (m, h) for part in ("gate", "up")}
        shapes |= {f"{name}.{part}_layernorm.weight": (h,) for part in ("input", "post_attention")}
        if spec.architecture == "qwen3":
            shapes |= {f"{name}.self_attn.{part}_norm.weight": (d,) for part in ("q", "k")}
    return shapes
