"""FLOPs of each stage, linear and attention apart, and how long the device computes them. Closed forms, no torch.

Rates are ``Hardware``'s: peak times an achievable fraction of its own for matmuls and for attention, assumed or
measured as the profile says. A matmul runs in the class of the compute dtype; weights stored in fewer bits are expanded
to it first. Only Linears of a format with a compute class of its own run in that one.
"""

from __future__ import annotations

from lowmem_flux2.planning.activations import decoder_channels
from lowmem_flux2.planning.formats import WeightFormat
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.vae_spec import VaeSpec
from lowmem_flux2.planning.workload import Workload

STEP_OVERHEADS = 4
"""Launches of a step outside its blocks (projections, norm, scheduler), in block overheads. Assumed."""
DECODER_OVERHEADS = 20
"""Launches of the decoder's 14 resnets, attention and convolutions, in block overheads. Assumed."""
ENCODER_OVERHEADS = 14
"""Launches of the encoder's 10 resnets, attention and convolutions, in block overheads. Assumed."""
CHUNK_OVERHEADS = 0.5
"""Launches of each chunk of tokens beyond the first (feed-forward, attention output), in block overheads. Assumed."""
INTEGER_SHARE = 0.5
"""What Linears of int8 inputs and weights reach of the matmul rate of int8. Assumed, not measured: their products are
written, scaled and rounded apart from the matmul, some 24 bytes of device memory for each. On an RTX 4090 (1 TB/s) that
is as long as the matmul itself for dev's widest Linear (6144 columns), on an RTX 3060 half as long."""


def block_flops(model: ModelSpec, workload: Workload, batch: int, is_first: bool = False) -> tuple[float, float, float]:
    """(linear of a double-stream block, linear of a single-stream block, attention of either) of one pass.

    2 FLOPs per weight and token that the weight sees: half a double-stream block's weights see the image, half the
    text, all of a single-stream block's see both. Attention is 4 S^2 h; of kept references (``reference_keys``) R^2 in
    the step that is the first, besides what all other tokens see.
    """
    dims, tokens = model.transformer, workload.sequence_tokens if is_first else workload.step_tokens
    double = batch * tokens * dims.double_block.linear_weights
    single = 2 * batch * tokens * dims.single_block.linear_weights
    seen = workload.step_tokens * workload.sequence_tokens
    seen += workload.reference_tokens**2 if is_first and workload.caches_references else 0
    return double, single, 4 * batch * seen * dims.hidden_size


def low_rank_flops(workload: Workload, batch: int) -> float:
    """Of all LoRA factors in one pass, as if every token met each of them."""
    return 2 * batch * workload.step_tokens * sum(adapter.values for adapter in workload.adapters)


def layer_flops(model: ModelSpec, workload: Workload, prompts: int) -> tuple[float, float]:
    """(linear, attention) of one text encoder layer in one pass over ``prompts`` prompts of text_tokens each."""
    dims, tokens = model.text_encoder, workload.text_tokens
    linear = 2 * dims.layer.linear_weights * prompts * tokens
    return linear, 4 * prompts * tokens**2 * dims.num_heads * dims.head_dim


def encode_picture_flops(vae: VaeSpec, width: int, height: int) -> float:
    """The VAE's encoder on one picture; as ``decode_flops``, its levels the other way, a resnet fewer in each."""
    widths = vae.block_out_channels
    flops = 18.0 * width * height * vae.in_channels * widths[0]
    for level, channels_out in enumerate(widths):
        channels_in = widths[max(level - 1, 0)]
        pixels = (width >> level) * (height >> level)
        convolutions = channels_in * channels_out + (2 * vae.layers_per_block - 1) * channels_out**2
        downsampler = channels_out**2 / 4 if level < len(widths) - 1 else 0
        flops += 18 * pixels * (convolutions + downsampler)
    latents = (width // vae.spatial_factor) * (height // vae.spatial_factor)
    flops += 18 * latents * (4 * widths[-1] ** 2 + 2 * widths[-1] * vae.latent_channels)
    return flops + (4 * latents**2 * widths[-1] if vae.mid_attention else 0)


def decode_flops(vae: VaeSpec, width: int, height: int) -> float:
    """2 x 9 x C_in x C_out x pixels for each 3x3 convolution (two a resnet, one an upsampler), and attention."""
    channels = decoder_channels(vae)
    flops = 0.0
    for level, channels_out in enumerate(channels):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        pixels = (width // shrink) * (height // shrink)
        convolutions = channels_in * channels_out + (2 * vae.layers_per_block + 1) * channels_out**2
        upsampler = 4 * channels_out**2 if level < len(channels) - 1 else 0
        flops += 18 * pixels * (convolutions + upsampler)
    latents = (width // vae.spatial_factor) * (height // vae.spatial_factor)
    flops += 18 * latents * 4 * channels[0] ** 2
    return flops + (4 * latents**2 * channels[0] if vae.mid_attention else 0)


def compute_rate(hardware: Hardware, compute_dtype: str) -> float:
    """Matmul FLOP/s of the compute dtype's class; a class that the device lacks runs at the fp32 rate."""
    return hardware.matmul_flops_per_s.get(compute_dtype, hardware.matmul_flops_per_s["fp32"])


def attention_rate(hardware: Hardware, compute_dtype: str) -> float:
    """Attention FLOP/s of the compute dtype's class.

    The profile has the rate of the device's main 16-bit class. In fp32 on a GPU no fused kernel uses tensor cores:
    attention is fp32 matmuls, at that class's rate at most.
    """
    rate = hardware.attention_flops_per_s
    if compute_dtype != "fp32" or hardware.device == "cpu":
        return rate
    return min(rate, compute_rate(hardware, "fp32"))


def linear_rate(hardware: Hardware, compute_dtype: str, fmt: WeightFormat) -> float:
    """FLOP/s of Linears in a weight format."""
    if not fmt.compute_class:
        return compute_rate(hardware, compute_dtype)
    return INTEGER_SHARE * compute_rate(hardware, fmt.compute_class)


def compute_seconds(
    hardware: Hardware,
    compute_dtype: str,
    linear_flops: float,
    attention_flops: float,
    fmt: WeightFormat,
    overheads: float = 1.0,
) -> float:
    """Linear and attention FLOPs, each at its class's rate, and so many block overheads."""
    linear_s = linear_flops / linear_rate(hardware, compute_dtype, fmt)
    attention_s = attention_flops / attention_rate(hardware, compute_dtype)
    return linear_s + attention_s + overheads * hardware.block_overhead_s
