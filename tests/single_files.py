"""Transformers as single files in the layouts that people download, made from a tiny diffusers folder.

The layouts are checked here against diffusers' own converter: what it makes of a state dict must be the folder's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import gguf
import numpy as np
import tiny
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
COMFY_PREFIX = "model.diffusion_model."
FP8_MAX = 448.0

_PLAIN = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
_DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def transformer_state(folder: Path) -> State:
    """The tensors of a diffusers folder's transformer."""
    return {
        name: tensor
        for path in (folder / "transformer").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def bfl_state(state: Mapping[str, torch.Tensor]) -> State:
    """The same tensors in BFL's layout."""
    made = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in _PLAIN.items() if f"{ours}.weight" in state}
    scale, shift = state["norm_out.linear.weight"].chunk(2)
    made["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for name, tensor in state.items():
        kind, _, rest = name.partition(".")
        index, _, within = rest.partition(".")
        if kind == "transformer_blocks" and within in _DOUBLE:
            made[f"double_blocks.{index}.{_DOUBLE[within]}"] = tensor
        elif kind == "single_transformer_blocks":
            made[f"single_blocks.{index}.{_SINGLE[within]}"] = tensor
        elif within == "attn.to_q.weight":
            fused = [state[f"{kind}.{index}.attn.to_{part}.weight"] for part in "qkv"]
            made[f"double_blocks.{index}.img_attn.qkv.weight"] = torch.cat(fused)
        elif within == "attn.add_q_proj.weight":
            fused = [state[f"{kind}.{index}.attn.add_{part}_proj.weight"] for part in "qkv"]
            made[f"double_blocks.{index}.txt_attn.qkv.weight"] = torch.cat(fused)
    back = diffusers_state(made)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    return {name: tensor.contiguous() for name, tensor in made.items()}


def diffusers_state(bfl: Mapping[str, torch.Tensor]) -> State:
    """What diffusers' own converter makes of BFL's layout."""
    converted: State = convert_flux2_transformer_checkpoint_to_diffusers(dict(bfl))
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def with_transformer(folder: Path, source: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a diffusers folder with another transformer's values, in fp32."""
    shutil.copytree(source, folder)
    for path in (folder / "transformer").glob("*.safetensors*"):
        path.unlink()
    values = {name: tensor.float().contiguous() for name, tensor in state.items()}
    save_file(values, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def prefixed(state: Mapping[str, torch.Tensor]) -> State:
    return {COMFY_PREFIX + name: tensor for name, tensor in state.items()}


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """The weights that releases quantize: those of the blocks' Linears."""
    return "blocks." in name and tensor.ndim == 2


# --- fp8 ------------------------------------------------------------------------------------------------------------


def fp8_state(bfl: Mapping[str, torch.Tensor], *, by_row: bool, ending: str, beside: str | None) -> tuple[State, State]:
    """e4m3 with scales, and what it decodes to in fp32: weight * scale, as `BFLQuantizationConfig` and ComfyUI have it.

    Args:
        by_row: one scale a row (shape (rows,)), else one for the tensor (shape ()).
        ending: of the scale's name after the Linear's.
        beside: ending of an activation scale's name, which readers of weights ignore.
    """
    stored: State = {}
    decoded: State = {}
    for name, tensor in bfl.items():
        if not is_linear(name, tensor):
            stored[name] = tensor
            decoded[name] = tensor.float()
            continue
        largest = tensor.float().abs()
        scale = (largest.amax(dim=1) if by_row else largest.amax()) / FP8_MAX
        factor = scale[:, None] if by_row else scale
        stored[name] = (tensor.float() / factor).to(torch.float8_e4m3fn)
        stored[name.removesuffix(".weight") + ending] = scale
        if beside is not None:
            stored[name.removesuffix(".weight") + beside] = torch.tensor(1.0)
        decoded[name] = stored[name].float() * factor
    return stored, decoded


# --- GGUF -----------------------------------------------------------------------------------------------------------


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int) -> np.ndarray[Any, Any]:
    """Random blocks of a K-quant, which gguf-py cannot make, (rows, bytes): their fp16 scales are small numbers."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
    last = {"Q2_K": (size - 4, size - 2), "Q3_K": (size - 2,), "Q6_K": (size - 2,)}
    places = last.get(kind.name, (0, 2))
    for place in places:
        scales = generator.uniform(0.00005, 0.0002, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(
    path: Path, bfl: Mapping[str, torch.Tensor], *kinds: str, architecture: str = "flux", prefix: str = ""
) -> State:
    """Write a GGUF file with the blocks' Linears in ``kinds`` by turns, other matrices in BF16 or F16, vectors in F32.

    Returns:
        What it holds, decoded by gguf-py in fp32.
    """
    writer = gguf.GGUFWriter(path, architecture)
    decoded: State = {}
    for number, (name, tensor) in enumerate(bfl.items()):
        values = tensor.float().numpy()
        quantized = gguf.GGMLQuantizationType[kinds[number % len(kinds)]]
        if tensor.ndim == 1:
            quantized = gguf.GGMLQuantizationType.F32
        elif not is_linear(name, tensor):
            quantized = gguf.GGMLQuantizationType.BF16 if number % 2 else gguf.GGMLQuantizationType.F16
        if quantized.name.endswith("_K"):
            stored = random_blocks(quantized, *values.shape, seed=number)
        else:
            stored = gguf.quants.quantize(values, quantized)
        writer.add_tensor(prefix + name, stored, raw_dtype=quantized)
        decoded[name] = torch.from_numpy(np.array(gguf.quants.dequantize(stored, quantized), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


def write_wide(folder: Path, source: Path) -> Path:
    """A copy of a tiny folder whose transformer is 256 wide: K-quants come in blocks of 256 weights."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    asked = {key: value for key, value in config.items() if not key.startswith("_")}
    transformer = Flux2Transformer2DModel(
        **{**asked, "num_attention_heads": 8, "num_layers": 1, "num_single_layers": 2}
    )
    tiny._randomize(transformer, 1, tiny._transformer_gain)
    for path in (folder / "transformer").iterdir():
        path.unlink()
    transformer.save_pretrained(folder / "transformer")
    return folder


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def bnb_linear(weight: torch.Tensor, kind: str, *, nested: bool) -> tuple[State, torch.Tensor]:
    """The tensors that bitsandbytes saves for a Linear, by their names after it, and its own decoded weight in fp32."""
    made = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type=kind, compress_statistics=nested
    )
    made.weight = bitsandbytes.nn.Params4bit(
        weight.float(), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    state = {name: tensor.clone() for name, tensor in made.to("cpu").state_dict().items()}
    # As one row: 0.50.2 takes wrong absmax on a CPU where rows are not a multiple of 64.
    quantized = made.weight.quant_state
    quantized.shape = torch.Size((1, weight.numel()))
    decoded = bitsandbytes.functional.dequantize_4bit(made.weight.data, quantized).view(weight.shape)
    return state, decoded


def write_bnb(folder: Path, source: Path, kind: str, *, nested: bool) -> tuple[Path, Path]:
    """Copies of a diffusers folder: with transformer and text encoder in bitsandbytes' 4 bits, and with those decoded.

    All Linears are quantized, as both libraries do it, but for lm_head.
    """
    quantized, decoded = shutil.copytree(source, folder / "bnb"), shutil.copytree(source, folder / "decoded")
    for part in ("transformer", "text_encoder"):
        path = next((source / part).glob("*.safetensors"))
        stored, plain = {}, {}
        for name, tensor in load_file(path).items():
            stored[name] = plain[name] = tensor
            if tensor.ndim == 2 and (part == "transformer" or ".layers." in name):
                state, plain[name] = bnb_linear(tensor, kind, nested=nested)
                stored |= {name.removesuffix("weight") + leaf: value for leaf, value in state.items()}
        save_file(stored, quantized / part / path.name)
        save_file({name: tensor.contiguous() for name, tensor in plain.items()}, decoded / part / path.name)
        config = json.loads((source / part / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            **{"load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False},
            **{"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested},
            **{"bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"},
        }
        (quantized / part / "config.json").write_text(json.dumps(config))
    return quantized, decoded
