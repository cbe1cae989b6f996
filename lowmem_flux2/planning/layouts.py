"""The names and rows of a transformer's tensors in the layouts of Black Forest Labs and ComfyUI, and in diffusers'.

BFL's own files fuse q, k and v of a double-stream block, and the final modulation is shift, scale where diffusers has
scale, shift. ComfyUI's files are BFL's with a prefix. All follow ``convert_flux2_transformer_checkpoint_to_diffusers``
of diffusers 0.42.1 (loaders/single_file_utils.py); tests run it on tensors of row numbers and compare every row.
Written down once more here because planning imports no torch, and because the converter wants all tensors in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.")
"""Before BFL's names in ComfyUI's files."""

Rows = tuple[tuple[int, int], ...]
"""Ranges of a stored tensor's rows, (first, number), one after the other."""

_MODULES: Final[Mapping[str, str]] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE: Final[Mapping[str, str]] = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FUSED: Final[Mapping[str, tuple[str, str, str]]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE: Final[Mapping[str, str]] = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_SWAPPED: Final = "final_layer.adaLN_modulation.1"
_BLOCK: Final = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def is_bfl(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names, without prefix, are in BFL's layout of FLUX.2."""
    return "img_in.weight" in names or any(_BLOCK.match(name) for name in names)


def bfl_modules(num_double: int, num_single: int) -> Iterator[str]:
    """BFL's names of all modules with weights."""
    yield from _MODULES
    for index in range(num_double):
        yield from (f"double_blocks.{index}.{name}" for name in (*_DOUBLE, *_FUSED))
    for index in range(num_single):
        yield from (f"single_blocks.{index}.{name}" for name in _SINGLE)


def model_tensors(name: str, num_rows: int) -> Iterator[tuple[str, Rows]]:
    """The tensors in diffusers' layout that one of BFL's holds, without prefix, and which of its rows each takes.

    Nothing for a tensor that the model does not have.
    """
    module, _, leaf = name.rpartition(".")
    leaf = "weight" if leaf == "scale" else leaf  # of the norms of q and k
    whole = ((0, num_rows),)
    if block := _BLOCK.match(module):
        kind, index, within = block.groups()
        prefix = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
        if kind == "double" and within in _FUSED:
            third = num_rows // 3
            for part, target in enumerate(_FUSED[within]):
                yield f"{prefix}.{index}.{target}.{leaf}", ((part * third, third),)
        elif target_name := (_DOUBLE if kind == "double" else _SINGLE).get(within):
            yield f"{prefix}.{index}.{target_name}.{leaf}", whole
    elif module == _SWAPPED:
        half = num_rows // 2
        yield f"{_MODULES[module]}.{leaf}", ((half, half), (0, half))
    elif module in _MODULES:
        yield f"{_MODULES[module]}.{leaf}", whole
