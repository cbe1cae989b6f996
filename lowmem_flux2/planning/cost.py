"""Closed-form cost of a stage: (StagePlan, ModelSpec, Workload, Hardware) -> bytes and seconds. No torch, no policy.

Activations are derived from where the live tensors peak in diffusers' and transformers' own forward functions; each
function names the tensors it counts. Times come from a time line of copies and computations, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS, WeightFormat
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import BlockSpec, ModelSpec, VaeSpec
from lowmem_flux2.planning.plan import Placement, StageCost, StagePlan
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

LIBRARIES_HOST_BYTES = 360 * MIB
"""Anonymous RSS of Python with torch, diffusers and transformers imported: 319 MiB read from /proc/self/status with
torch 2.13 CPU, diffusers 0.42.1, transformers 5.23 (2026-11-23), plus the tokenizer and configs."""
CUDA_HOST_BYTES = 600 * MIB
"""Added by CUDA initialisation and its libraries. Assumed, not measured: no GPU was at hand."""


def margin_bytes(activation_bytes: int, resident_bytes: int) -> int:
    """Allocator fragmentation and library workspaces: 64 MiB and 5 % of activations and 1 % of weights.

    A stated margin, not a derived one: cuBLAS and cuDNN workspaces are 8-32 MiB each (their documentation), the caching
    allocator rounds blocks above 1 MiB up to 2 MiB.
    """
    return 64 * MIB + activation_bytes // 20 + resident_bytes // 100


# ---------------------------------------------------------------------------------------------------- activations


def denoise_activation_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int, chunk: int) -> int:
    """Peak live activations of one transformer pass.

    The peak is the concatenation in a single-stream block (Flux2ParallelSelfAttnProcessor), tokens S, hidden size h,
    MLP m = mlp_ratio * h: block input h, modulated norm h, the fused projection 3h + 2m (its views keep it whole), rotated
    query and key 2h, attention output h, gated MLP m, and the concatenation h + m: (9h + 4m) S elements. For dev at 1024
    px that is 1134 MiB, and 1165 with what is constant: text embeddings, RoPE tables (two fp32 tables of head_dim), the
    latents and the prediction. A second guidance pass keeps one more hidden state and its text embeddings.
    """
    dims = model.transformer
    hidden, mlp = dims.hidden_size, int(dims.hidden_size * dims.mlp_ratio)
    tokens = batch * workload.sequence_tokens
    image = batch * (workload.image_tokens + workload.reference_tokens)
    text = batch * workload.text_tokens
    if chunk and chunk < workload.sequence_tokens:
        # The fused projection lives for one chunk; query, key and value of all tokens stay for attention.
        peak = tokens * 7 * hidden + batch * chunk * (hidden + 4 * mlp)
    else:
        peak = tokens * (9 * hidden + 4 * mlp)
    # Double-stream: both streams' input, norm, q/k/v and attention (10h), then the image stream's feed-forward 4m.
    double = tokens * 4 * hidden + image * (2 * hidden + (4 * mlp))
    constant = text * dims.joint_dim + text * hidden + 4 * image * dims.in_channels
    rope = 2 * workload.sequence_tokens * dims.head_dim * 4
    per_pass = (workload.guidance_passes - 1) * (tokens * hidden + text * dims.joint_dim)
    fp32_latents = 2 * image * dims.in_channels * 4
    return (max(peak, double) + constant + per_pass) * dtype_bytes + rope + fp32_latents


def encode_activation_bytes(model: ModelSpec, workload: Workload, prompts: int, dtype_bytes: int) -> int:
    """Peak live activations of one pass over the text encoder's used layers.

    In the MLP of a layer act(gate), up and their product live together (3 x intermediate), with the residual and the
    norm (2 x hidden), the tapped states so far, and the additive or boolean mask (tokens^2, one byte, or the dtype).
    The negative prompts of true guidance go through each layer after the prompts: one more hidden state and taps.
    """
    dims = model.text_encoder
    tokens = prompts * workload.text_tokens
    per_token = 3 * dims.intermediate_size + (2 + len(dims.out_layers)) * dims.hidden_size
    mask = prompts * workload.text_tokens**2 * dtype_bytes
    waiting = (workload.guidance_passes - 1) * tokens * (1 + len(dims.out_layers)) * dims.hidden_size
    stacked = tokens * dims.joint_dim
    return (max(tokens * per_token, 2 * stacked) + waiting) * dtype_bytes + mask * workload.guidance_passes


def decode_activation_bytes(vae: VaeSpec, width: int, height: int, tile_px: int, dtype_bytes: int) -> int:
    """Peak live activations of decoding one image.

    In each up-block's first resnet the input, its norm and its non-linearity live together: 3 x channels_in x pixels at
    that level; the widest is the last block (256 channels at full resolution: 1536 of the 1538 MiB at 1024 px).
    Tiled, one tile's peak and every finished tile (3 channels) until they are stitched, twice.
    """
    tile_w, tile_h = (min(width, tile_px), min(height, tile_px)) if tile_px else (width, height)
    channels = tuple(reversed(vae.block_out_channels))
    peak = 0
    for level, _ in enumerate(channels):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        peak = max(peak, 3 * channels_in * (tile_w // shrink) * (tile_h // shrink))
    picture = 3 * width * height
    latents = 2 * vae.latent_channels * (width // vae.spatial_factor) * (height // vae.spatial_factor)
    # uint8 and float copies in the image processor come after the peak is gone.
    return (peak + picture * (2 if tile_px else 1) + latents) * dtype_bytes


# ------------------------------------------------------------------------------------------------------- seconds


def double_block_seconds(model: ModelSpec, workload: Workload, batch: int, hardware: Hardware, rate: float) -> float:
    """A double-stream block: each weight sees its own stream's tokens (half the weights each), attention sees all."""
    block = model.transformer.blocks[0]
    per_weight = batch * (workload.image_tokens + workload.reference_tokens + workload.text_tokens)
    linear = 2 * (block.linear_weights / 2) * per_weight
    return linear / rate + _attention_seconds(model, workload, batch, hardware)


def single_block_seconds(model: ModelSpec, workload: Workload, batch: int, hardware: Hardware, rate: float) -> float:
    """A single-stream block: 2 FLOPs per weight and token, 4 S^2 h for attention."""
    block = model.transformer.blocks[-1]
    linear = 2 * block.linear_weights * batch * workload.sequence_tokens
    return linear / rate + _attention_seconds(model, workload, batch, hardware)


def _attention_seconds(model: ModelSpec, workload: Workload, batch: int, hardware: Hardware) -> float:
    flops = 4 * batch * workload.sequence_tokens**2 * model.transformer.hidden_size
    return flops / hardware.attention_flops_per_s


def decode_flops(vae: VaeSpec, width: int, height: int) -> float:
    """2 x 9 x C_in x C_out x pixels for each 3x3 convolution of the decoder (two a resnet, one an upsampler)."""
    channels = tuple(reversed(vae.block_out_channels))
    flops = 0.0
    for level, channels_out in enumerate(channels):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        pixels = (width // shrink) * (height // shrink)
        convolutions = channels_in * channels_out + (2 * vae.layers_per_block + 1) * channels_out**2
        upsampler = 4 * channels_out**2 if level < len(channels) - 1 else 0
        flops += 18 * pixels * (convolutions + upsampler)
    middle = channels[0] ** 2 * 4 * (width // vae.spatial_factor) * (height // vae.spatial_factor)
    return flops + 18 * middle


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step in the steady state: its length, and how long the compute waited for copies. Seconds."""

    step_s: float
    waiting_s: float


def timeline(compute_s: Sequence[float], copy_s: Sequence[float], slots: int) -> Timeline:
    """Simulate two rounds over the blocks on one copy engine and one compute stream; report the second.

    Copies are made in order; the copy for the k-th streamed use may start when the previous copy is done and the slot is
    free, that is when the use ``slots`` before it has been computed. Resident blocks have a copy time of 0 and no slot.
    """
    copy_done = compute_done = 0.0
    released: list[float] = []
    round_end = waiting = 0.0
    for _ in range(2):
        round_start, waiting = compute_done, 0.0
        for compute, copy in zip(compute_s, copy_s, strict=True):
            ready = compute_done
            if copy > 0:
                free_at = released[-slots] if len(released) >= slots else 0.0
                copy_done = max(copy_done, free_at) + copy
                ready = max(compute_done, copy_done)
            waiting += ready - compute_done
            compute_done = ready + compute
            if copy > 0:
                released.append(compute_done)
        round_end = compute_done - round_start
    return Timeline(round_end, waiting)


def copy_seconds(placement: Placement, block_bytes: int, hardware: Hardware) -> float:
    """Time to bring one block to the compute device from where it rests."""
    if placement is Placement.GPU:
        return 0.0
    rate = {
        Placement.PINNED: hardware.h2d_pinned_bytes_per_s,
        Placement.PAGEABLE: hardware.h2d_pageable_bytes_per_s,
        Placement.DISK: min(hardware.disk_read_bytes_per_s, hardware.h2d_pinned_bytes_per_s),
    }[placement]
    return block_bytes / rate


# -------------------------------------------------------------------------------------------------------- stages


def compute_rate(hardware: Hardware, compute_dtype: str) -> float:
    """Matmul FLOP/s of the compute dtype's class; a class that the device lacks runs at the fp32 rate."""
    return hardware.matmul_flops_per_s.get(compute_dtype, hardware.matmul_flops_per_s["fp32"])


def stage_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    """Price one stage. Deterministic; reads nothing but its arguments."""
    if stage.stage == "encode":
        return _encode_cost(stage, model, workload, hardware)
    if stage.stage == "denoise":
        return _denoise_cost(stage, model, workload, hardware)
    return _decode_cost(stage, model, workload, hardware)


def _denoise_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, dims = FORMATS[stage.weight_format], model.transformer
    dtype_bytes = DTYPE_BYTES[stage.compute_dtype]
    blocks = dims.blocks
    rate = compute_rate(hardware, stage.compute_dtype)
    double_s = double_block_seconds(model, workload, stage.batch_size, hardware, rate)
    single_s = single_block_seconds(model, workload, stage.batch_size, hardware, rate)
    overhead = hardware.block_overhead_s
    compute = [
        workload.guidance_passes * ((double_s if block.kind == "double" else single_s) + overhead) for block in blocks
    ]
    bytes_each = [fmt.block_bytes(block) for block in blocks]
    copies = [
        copy_seconds(placement, size, hardware)
        for placement, size in zip(stage.block_placements, bytes_each, strict=True)
    ]
    line = timeline(compute, copies, max(stage.slots, 1))
    rounds = -(-workload.num_images // stage.batch_size) * workload.steps
    activation = denoise_activation_bytes(model, workload, stage.batch_size, dtype_bytes, stage.chunk_tokens)
    activation += max(fmt.transient_bytes(block) for block in blocks)
    return _assemble(
        stage,
        fmt,
        hardware,
        blocks,
        # Embedders and modulation run once per generation, before any block is loaded, and are dropped again.
        once_bytes=fmt.plain_bytes(dims.conditioning_weights),
        non_block_bytes=fmt.plain_bytes(dims.remaining_non_block_weights),
        activation=activation,
        run_s=rounds * (line.step_s + 4 * overhead),
        waiting_s=rounds * line.waiting_s,
        uses=rounds,
    )


def _encode_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, dims = FORMATS[stage.weight_format], model.text_encoder
    dtype_bytes = DTYPE_BYTES[stage.compute_dtype]
    blocks = dims.blocks
    tokens = stage.batch_size * workload.text_tokens
    rate = compute_rate(hardware, stage.compute_dtype)
    attention = 4 * stage.batch_size * workload.text_tokens**2 * dims.num_heads * dims.head_dim
    compute = [
        workload.guidance_passes
        * (
            2 * block.linear_weights * tokens / rate
            + attention / hardware.attention_flops_per_s
            + hardware.block_overhead_s
        )
        for block in blocks
    ]
    copies = [
        copy_seconds(placement, fmt.block_bytes(block), hardware)
        for placement, block in zip(stage.block_placements, blocks, strict=True)
    ]
    line = timeline(compute, copies, max(stage.slots, 1))
    passes = -(-workload.num_prompts // stage.batch_size)
    activation = encode_activation_bytes(model, workload, stage.batch_size, dtype_bytes)
    activation += max(fmt.transient_bytes(block) for block in blocks)
    return _assemble(
        stage,
        fmt,
        hardware,
        blocks,
        # The embedding stays on the host as it is stored on disk: only the prompt's rows are read.
        non_block_bytes=0,
        activation=activation,
        run_s=passes * line.step_s,
        waiting_s=passes * line.waiting_s,
        uses=passes,
    )


def _decode_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, dims = FORMATS[stage.weight_format], model.vae
    dtype_bytes = DTYPE_BYTES[stage.compute_dtype]
    flops = decode_flops(dims, workload.width, workload.height)
    if stage.tile_px:
        flops *= tiled_pixels_ratio(workload.width, workload.height, stage.tile_px)
    # Convolutions reach about half of the matmul rate (assumed; calibration replaces it).
    run_s = workload.num_images * (
        flops / (compute_rate(hardware, stage.compute_dtype) / 2) + 20 * hardware.block_overhead_s
    )
    return _assemble(
        stage,
        fmt,
        hardware,
        (),
        non_block_bytes=fmt.plain_bytes(dims.decoder_weights),
        activation=decode_activation_bytes(dims, workload.width, workload.height, stage.tile_px, dtype_bytes),
        run_s=run_s,
        waiting_s=0.0,
        uses=1,
    )


def tiled_pixels_ratio(width: int, height: int, tile_px: int) -> float:
    """Pixels decoded in tiles over pixels of the picture (a quarter of each tile overlaps its neighbour)."""
    step = tile_px - tile_px // 4
    across = sum(min(tile_px, width - x) for x in range(0, width, step))
    down = sum(min(tile_px, height - y) for y in range(0, height, step))
    return across * down / (width * height)


def _assemble(
    stage: StagePlan,
    fmt: WeightFormat,
    hardware: Hardware,
    blocks: Sequence[BlockSpec],
    *,
    non_block_bytes: int,
    activation: int,
    once_bytes: int = 0,
    run_s: float,
    waiting_s: float,
    uses: int,
) -> StageCost:
    """Add up what all stages share: placements, slots, host side, load time."""
    at: dict[Placement, int] = dict.fromkeys(Placement, 0)
    largest = streamed_largest = 0
    for placement, block in zip(stage.block_placements, blocks, strict=True):
        size = fmt.block_bytes(block)
        at[placement] += size
        largest = max(largest, size)
        if placement is not Placement.GPU:
            streamed_largest = max(streamed_largest, size)
    resident = at[Placement.GPU] + non_block_bytes
    slots = stage.slots * streamed_largest
    activation = max(activation, once_bytes - at[Placement.GPU] - slots)
    pinned = at[Placement.PINNED]
    on_host = hardware.device == "cpu"
    margin = margin_bytes(activation, resident + slots)
    ring = stage.slots * streamed_largest if at[Placement.DISK] and not on_host else 0
    host = LIBRARIES_HOST_BYTES + at[Placement.PAGEABLE]
    if on_host:
        host += resident + slots + activation + margin
    else:
        host += CUDA_HOST_BYTES + min(largest or non_block_bytes, 256 * MIB)  # read buffer while loading
    streamed_bytes = sum(at.values()) - at[Placement.GPU]
    loaded = resident + once_bytes + at[Placement.PINNED] + at[Placement.PAGEABLE]
    load_s = loaded / hardware.disk_read_bytes_per_s
    if not on_host:
        load_s += pinned / hardware.pin_bytes_per_s + resident / hardware.h2d_pageable_bytes_per_s
    return StageCost(
        resident_bytes=resident,
        slot_bytes=slots,
        activation_bytes=activation,
        margin_bytes=margin,
        context_bytes=0 if on_host else hardware.context_bytes,
        host_pinned_bytes=pinned + ring,
        host_bytes=host,
        disk_bytes=loaded + uses * at[Placement.DISK],
        h2d_bytes=0 if on_host else resident + uses * streamed_bytes,
        load_s=load_s,
        run_s=run_s,
        time_s=load_s + run_s,
        waiting_s=waiting_s,
        fidelity_error=fmt.weight_error,
        fidelity_provenance=fmt.provenance,
        on_host=on_host,
    )
