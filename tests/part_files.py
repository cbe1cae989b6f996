"""Text encoders and VAEs as single files in the layouts that people download, made from tiny diffusers folders.

The names of a VAE are checked against diffusers' converter, those of GGUF files against gguf-py's, and their turned
rows against what transformers does to such a file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import single_files as forms
import tiny
import torch
from diffusers import AutoencoderKLFlux2
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

State = dict[str, torch.Tensor]
HEAD_DIM = 128
"""Mistral's, which a safetensors file does not tell."""
USED = {"qwen3": 27, "mistral3": 30}


# --- text encoders --------------------------------------------------------------------------------------------------


def write_encoder(folder: Path, source: Path) -> Path:
    """A copy of a tiny folder whose text encoder has the released ones' rotary base, and Mistral's head size."""
    shutil.copytree(source, folder)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    is_mistral = text is not config
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e9 if is_mistral else 1e6}
    if is_mistral:
        text |= {"head_dim": HEAD_DIM, "num_attention_heads": 2, "num_key_value_heads": 1}
        weights = folder / "text_encoder" / "model.safetensors"
        state = load_file(weights)
        generator = torch.Generator().manual_seed(5)
        for name in state:
            rows = {"q_proj": 2 * HEAD_DIM, "k_proj": HEAD_DIM, "v_proj": HEAD_DIM, "o_proj": tiny.HIDDEN}
            if "vision" not in name and (count := rows.get(name.split(".")[-2])):
                columns = 2 * HEAD_DIM if count == tiny.HIDDEN else tiny.HIDDEN
                state[name] = torch.randn(count, columns, generator=generator) / columns**0.5
        save_file(state, weights, {"format": "pt"})
    path.write_text(json.dumps(config))
    return folder


def encoder_state(folder: Path) -> State:
    """The text part, under the names of ComfyUI's files: those of transformers' inner decoder."""
    state = load_file(folder / "text_encoder" / "model.safetensors")
    return {
        "model." + name[name.index(start) :]: tensor
        for name, tensor in state.items()
        for start in ("embed_tokens.", "layers.", "norm.weight")
        if "vision" not in name and "multi_modal" not in name and name.rpartition("model.")[2].startswith(start)
    }


def with_encoder(folder: Path, source: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """A copy of a folder whose text encoder has other values, in fp32; without its vision part, which is not read."""
    shutil.copytree(source, folder)
    root = "model.language_model." if _is_mistral(source) else "model."
    values = {name.replace("model.", root, 1): tensor.float().contiguous() for name, tensor in state.items()}
    save_file(values, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return folder


def _is_mistral(folder: Path) -> bool:
    return "text_config" in json.loads((folder / "text_encoder" / "config.json").read_text())


def comfyui_encoder(folder: Path) -> tuple[State, State]:
    """As in ``mistral_3_small_flux2_bf16`` and ``qwen_3_4b``, and decoded: Mistral's is cut off after its layer 30 and
    has neither norm nor head, but its tokenizer as bytes."""
    state = {name: tensor.bfloat16() for name, tensor in encoder_state(folder).items()}
    if not _is_mistral(folder):
        return state, state
    used = {name: tensor for name, tensor in state.items() if name != "model.norm.weight"}
    used = {
        name: tensor for name, tensor in used.items() if not name.startswith(("model.layers.30", "model.layers.31"))
    }
    return {**used, "tekken_model": torch.zeros(100, dtype=torch.uint8)}, state


def fp8_encoder(folder: Path) -> tuple[State, State]:
    """As in ``mistral_3_small_flux2_fp8``: a scale a Linear, and a note in JSON of how it is quantized."""
    stored, decoded = {}, {}
    for name, tensor in encoder_state(folder).items():
        if tensor.ndim != 2 or ".layers." not in name:
            stored[name], decoded[name] = tensor.bfloat16(), tensor.bfloat16()
            continue
        scale = tensor.abs().amax() / forms.FP8_MAX
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        owner = name.removesuffix(".weight")
        stored[f"{owner}.weight_scale"] = scale
        stored[f"{owner}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        decoded[name] = stored[name].float() * scale
    return stored, decoded


ENCODERS: dict[str, Callable[[Path], tuple[State, State]]] = {"comfyui": comfyui_encoder, "fp8": fp8_encoder}


def write_gguf_encoder(
    path: Path, folder: Path, kind: str, architecture: str, *, layers: int | None = None, **fields: Any
) -> State:
    """A GGUF file as llama.cpp's converter makes it, all matrices quantized; what it holds, decoded by gguf-py."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    text = config.get("text_config", config)
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    names = gguf.get_tensor_name_map(
        {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture], text["num_hidden_layers"]
    )
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(text["head_dim"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 1])
    for key, value in fields.items():
        writer.add_string(f"{architecture}.{key}", value)
    decoded: State = {}
    for name, tensor in encoder_state(folder).items():
        values = tensor.float().numpy()
        is_turned = architecture != "qwen3" and ("q_proj" in name or "k_proj" in name)
        count = heads if "q_proj" in name else kv_heads
        if is_turned:  # LlamaModel.permute of llama.cpp's converter
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        quantized = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        stored = gguf.quants.quantize(np.ascontiguousarray(values), quantized)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        writer.add_tensor(theirs, stored, raw_dtype=quantized)
        back = np.array(gguf.quants.dequantize(stored, quantized), dtype=np.float32)
        if is_turned:
            back = LlamaTensorProcessor()._reverse_permute_weights(back, count)
        decoded[name] = torch.from_numpy(np.ascontiguousarray(back))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return decoded


# --- VAE ------------------------------------------------------------------------------------------------------------


def write_vae(folder: Path, source: Path) -> Path:
    """A copy of a tiny folder whose VAE has norms in 32 groups, as the released one."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "vae")
    vae = AutoencoderKLFlux2(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=tiny.LATENT_CHANNELS
    )
    tiny._randomize(vae, 2)
    vae.bn.running_mean.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(3))
    vae.save_pretrained(folder / "vae")
    return folder


def vae_state(folder: Path) -> State:
    return load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")


def bfl_vae_state(state: Mapping[str, torch.Tensor], levels: int = 4) -> State:
    """The same tensors in BFL's layout, as in ``ae.safetensors`` and ``flux2-vae.safetensors``."""
    made = {bfl_vae_name(name, levels): tensor for name, tensor in state.items()}
    for name, tensor in made.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            made[name] = tensor[:, :, None, None]
    config = {"down_block_types": range(levels), "up_block_types": range(levels)}
    inside = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    plain = {
        inside.get(name.rpartition(".")[0], name.rpartition(".")[0]) + f".{name.rpartition('.')[2]}": value
        for name, value in made.items()
    }
    back = convert_ldm_vae_checkpoint(plain, config) | {name: value for name, value in made.items() if "bn." in name}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    return {name: tensor.contiguous() for name, tensor in made.items()}


def bfl_vae_name(name: str, levels: int) -> str:
    parts = name.split(".")
    if parts[0] in ("quant_conv", "post_quant_conv"):
        return f"{'encoder' if parts[0] == 'quant_conv' else 'decoder'}.{name}"
    if parts[1] in ("down_blocks", "up_blocks"):
        level = int(parts[2]) if parts[1] == "down_blocks" else levels - 1 - int(parts[2])
        head = f"{parts[0]}.{parts[1].removesuffix('_blocks')}.{level}"
        if parts[3] == "resnets":
            return f"{head}.block.{parts[4]}.{'.'.join(parts[5:])}".replace("conv_shortcut", "nin_shortcut")
        return f"{head}.{parts[3].removesuffix('rs').removesuffix('e')}e.conv.{parts[-1]}"
    if parts[1] == "mid_block":
        if parts[2] == "resnets":
            return f"{parts[0]}.mid.block_{int(parts[3]) + 1}.{'.'.join(parts[4:])}"
        leaf = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[parts[4]]
        return f"{parts[0]}.mid.attn_1.{leaf}.{parts[-1]}"
    return name.replace("conv_norm_out", "norm_out")
