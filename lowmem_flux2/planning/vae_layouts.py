"""The names of a VAE's tensors in the layout of Black Forest Labs (and ComfyUI), and in diffusers'.

They follow ``convert_ldm_vae_checkpoint`` of diffusers 0.42.1 (loaders/single_file_utils.py), and for what it lacks
diffusers' scripts/convert_flux2_to_diffusers.py: quant_conv and post_quant_conv are inside encoder and decoder, the
batch norm keeps its names. Levels of the decoder are counted from the other end; attention's 1x1 convolutions are
matrices in diffusers. Tests compare with that converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

PREFIXES: Final = ("first_stage_model.", "vae.")
"""Before these names in files that hold more than the VAE."""
_CONVOLUTIONS: Final[Mapping[str, str]] = {
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    "encoder.norm_out": "encoder.conv_norm_out",
    "decoder.norm_out": "decoder.conv_norm_out",
    **{name: name for half in ("encoder", "decoder") for name in (f"{half}.conv_in", f"{half}.conv_out")},
    "bn": "bn",
}
_ATTENTION: Final[Mapping[str, str]] = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_RESNET: Final = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.block\.(\d+)\.(\w+)")
_RESAMPLER: Final = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:down|up)sample\.conv")
_MIDDLE: Final = re.compile(r"(encoder|decoder)\.mid\.(?:block_(\d)|attn_1)\.(\w+)")
_LEVEL: Final = re.compile(r"decoder\.up\.(\d+)\.")


def is_bfl_vae(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names are in BFL's layout of a VAE."""
    return "decoder.mid.block_1.conv1.weight" in names


def num_levels(names: Mapping[str, object]) -> int:
    """Levels of the decoder."""
    return 1 + max((int(level[1]) for name in names if (level := _LEVEL.match(name))), default=-1)


def vae_tensor(name: str, levels: int) -> str | None:
    """diffusers' name of one of BFL's tensors; None for one that the VAE does not have."""
    module, _, leaf = name.rpartition(".")
    if module in _CONVOLUTIONS:
        return f"{_CONVOLUTIONS[module]}.{leaf}"
    if found := _RESNET.fullmatch(module):
        part, level, block, within = found.groups()
        return f"{_blocks(part, int(level), levels)}.resnets.{block}.{_short(within)}.{leaf}"
    if found := _RESAMPLER.fullmatch(module):
        kind = "downsamplers" if found[1] == "encoder.down" else "upsamplers"
        return f"{_blocks(found[1], int(found[2]), levels)}.{kind}.0.conv.{leaf}"
    if found := _MIDDLE.fullmatch(module):
        half, block, within = found.groups()
        if block is not None:
            return f"{half}.mid_block.resnets.{int(block) - 1}.{_short(within)}.{leaf}"
        target = _ATTENTION.get(within)
        return target and f"{half}.mid_block.attentions.0.{target}.{leaf}"
    return None


def _blocks(part: str, level: int, levels: int) -> str:
    return f"encoder.down_blocks.{level}" if part == "encoder.down" else f"decoder.up_blocks.{levels - 1 - level}"


def _short(name: str) -> str:
    return "conv_shortcut" if name == "nin_shortcut" else name
