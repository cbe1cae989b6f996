"""Closed-form cost of a stage: (StagePlan, ModelSpec, Workload, Hardware) -> bytes and seconds. No torch, no policy.

Times come from a time line of copies and computations, block by block; activations from ``activations``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_flux2.planning.activations import (
    conditioning_bytes,
    decode_activation_bytes,
    decoder_channels,
    denoise_activation_bytes,
    encode_activation_bytes,
)
from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec, VaeSpec
from lowmem_flux2.planning.plan import Placement, StageCost, StagePlan
from lowmem_flux2.planning.tiles import tiled_pixels_ratio
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

LIBRARIES_HOST_BYTES = 360 * MIB
"""Anonymous RSS of Python with torch, diffusers and transformers imported: 319 MiB in /proc/self/status with
torch 2.13 CPU, diffusers 0.42.1, transformers 5.23 (2026-11-23), plus the tokenizer and configs."""
STAGE_SETUP_S = 0.02
"""Reading configs and building a stage's modules on the meta device: 15 to 30 ms measured for the model shapes on a
2-core AMD EPYC (Zen 5), 2026-11-23."""
CUDA_HOST_BYTES = 600 * MIB
"""Added by CUDA initialisation and its libraries. Assumed, not measured: no GPU was at hand."""
READ_BUFFER_BYTES = 16 * MIB
"""Values are converted from the stored dtype in pieces of this size (``runtime.checkpoint.CONVERT_BYTES``)."""
CONVOLUTION_SHARE = 0.5
"""Share of the matmul rate that convolutions reach. Assumed; calibration is to replace it."""
STEP_OVERHEADS = 4
"""Launches of a step outside its blocks (projections, norm, scheduler), in block overheads. Assumed."""
ROUNDS_SIMULATED = 2
"""The first round starts with empty slots; from the second on every round is alike."""
DECODER_OVERHEADS = 20
"""Launches of the decoder's 14 resnets, attention and convolutions, in block overheads. Assumed."""


def margin_bytes(activation_bytes: int, resident_bytes: int) -> int:
    """Allocator fragmentation and library workspaces: 64 MiB and 5 % of activations and 1 % of weights.

    A stated margin, not a derived one: cuBLAS and cuDNN workspaces are 8-32 MiB each (their documentation), the
    caching allocator rounds blocks above 1 MiB up to 2 MiB.
    """
    return 64 * MIB + activation_bytes // 20 + resident_bytes // 100


# ------------------------------------------------------------------------------------------------------- seconds


def block_flops(model: ModelSpec, workload: Workload, batch: int) -> tuple[float, float, float]:
    """(linear of a double-stream block, linear of a single-stream block, attention of either) of one pass.

    2 FLOPs per weight and token that the weight sees: half a double-stream block's weights see the image, half the
    text, all of a single-stream block's see both. Attention is 4 S^2 h.
    """
    dims, tokens = model.transformer, workload.sequence_tokens
    double = batch * tokens * dims.double_block.linear_weights
    single = 2 * batch * tokens * dims.single_block.linear_weights
    return double, single, 4 * batch * tokens**2 * dims.hidden_size


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


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step in the steady state: its length, and how long the compute waited for copies. Seconds."""

    step_s: float
    waiting_s: float


def timeline(compute_s: Sequence[float], copy_s: Sequence[float], slots: int) -> Timeline:
    """Simulate a few rounds over the blocks on one copy engine and one compute stream; report the last.

    Copies are made in order; the copy for the k-th streamed use may start when the previous copy is done and the slot
    is free, that is when the use ``slots`` before it has been computed. Resident blocks have a copy time of 0 and no
    slot.
    """
    if not any(copy_s):
        return Timeline(sum(compute_s), 0.0)
    copy_done = compute_done = waiting = round_start = 0.0
    released = [0.0] * slots  # when each slot's last use was computed
    use = 0
    for _ in range(ROUNDS_SIMULATED):
        round_start, waiting = compute_done, 0.0
        for compute, copy in zip(compute_s, copy_s, strict=True):
            if copy > 0:
                slot = use % slots
                copy_done = max(copy_done, released[slot]) + copy
                if copy_done > compute_done:
                    waiting += copy_done - compute_done
                    compute_done = copy_done
                compute_done += compute
                released[slot] = compute_done
                use += 1
            else:
                compute_done += compute
    return Timeline(compute_done - round_start, waiting)


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


def block_sizes(stage: StagePlan, model: ModelSpec) -> list[int]:
    """Stored bytes of each block of the stage's component in its weight format, in the order of use."""
    fmt = FORMATS[stage.weight_format]
    if stage.stage == "decode":
        return []
    if stage.stage == "encode":
        return [fmt.block_bytes(model.text_encoder.layer)] * model.text_encoder.layers_used
    dims = model.transformer
    return [fmt.block_bytes(dims.double_block)] * dims.num_double + [
        fmt.block_bytes(dims.single_block)
    ] * dims.num_single


@dataclass(frozen=True, slots=True)
class _Load:
    """What a stage loads and works on besides its blocks. Bytes, and seconds of its time line.

    Args:
        kept_bytes: non-block weights that stay on the device for the whole stage.
        activation_bytes: with the format's transient.
        once_bytes: weights and tensors that live on the device before any block is loaded, and are dropped again.
        once_staging_bytes: host memory that those pass through.
        host_bytes: tensors that the stage takes or leaves in RAM.
        rounds: passes over the blocks.
        round_s, waiting_s: of one round.
    """

    kept_bytes: int
    activation_bytes: int
    once_bytes: int = 0
    once_staging_bytes: int = 0
    host_bytes: int = 0
    rounds: int = 1
    round_s: float = 0.0
    waiting_s: float = 0.0


def _line(stage: StagePlan, sizes: Sequence[int], compute_s: Sequence[float], hardware: Hardware) -> Timeline:
    seconds = {
        (placement, size): copy_seconds(placement, size, hardware) for placement in Placement for size in set(sizes)
    }
    copies = [seconds[pair] for pair in zip(stage.block_placements, sizes, strict=True)]
    return timeline(compute_s, copies, max(stage.slots, 1))


def _denoise_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, dims = FORMATS[stage.weight_format], model.transformer
    dtype_bytes, batch, passes = DTYPE_BYTES[stage.compute_dtype], stage.batch_size, workload.guidance_passes
    rate, overhead_s = compute_rate(hardware, stage.compute_dtype), hardware.block_overhead_s
    double, single, attention = block_flops(model, workload, batch)
    attention_s = attention / hardware.attention_flops_per_s
    double_s = passes * (double / rate + attention_s + overhead_s)
    single_s = passes * (single / rate + attention_s + overhead_s)
    compute = [double_s] * dims.num_double + [single_s] * dims.num_single
    sizes = block_sizes(stage, model)
    line = _line(stage, sizes, compute, hardware)
    transient = max(fmt.transient_bytes(dims.double_block), fmt.transient_bytes(dims.single_block))
    text_input = passes * workload.text_tokens * dims.joint_dim * dtype_bytes
    largest_embedder = max(6 * dims.hidden_size, dims.joint_dim) * dims.hidden_size
    noise = workload.num_images * workload.image_tokens * dims.in_channels * dtype_bytes
    return _assemble(
        stage,
        sizes,
        hardware,
        _Load(
            kept_bytes=fmt.plain_bytes(dims.remaining_non_block_weights),
            activation_bytes=denoise_activation_bytes(model, workload, batch, dtype_bytes, stage.chunk_tokens)
            + transient,
            once_bytes=fmt.plain_bytes(dims.conditioning_weights)
            + conditioning_bytes(model, workload, dtype_bytes)
            + batch * text_input,
            once_staging_bytes=fmt.plain_bytes(largest_embedder),
            host_bytes=workload.num_images * text_input + 2 * noise,
            rounds=-(-workload.num_images // batch) * workload.steps,
            round_s=line.step_s + STEP_OVERHEADS * overhead_s,
            waiting_s=line.waiting_s,
        ),
    )


def _encode_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, dims = FORMATS[stage.weight_format], model.text_encoder
    dtype_bytes, passes = DTYPE_BYTES[stage.compute_dtype], workload.guidance_passes
    tokens = stage.batch_size * workload.text_tokens
    attention = 4 * stage.batch_size * workload.text_tokens**2 * dims.num_heads * dims.head_dim
    layer_s = passes * (
        2 * dims.layer.linear_weights * tokens / compute_rate(hardware, stage.compute_dtype)
        + attention / hardware.attention_flops_per_s
        + hardware.block_overhead_s
    )
    sizes = block_sizes(stage, model)
    line = _line(stage, sizes, [layer_s] * dims.layers_used, hardware)
    embeddings = workload.num_prompts * passes * workload.text_tokens * dims.joint_dim * dtype_bytes
    return _assemble(
        stage,
        sizes,
        hardware,
        _Load(
            kept_bytes=0,  # the embedding stays in its file: only the prompts' rows are read
            activation_bytes=encode_activation_bytes(model, workload, stage.batch_size, dtype_bytes)
            + fmt.transient_bytes(dims.layer),
            host_bytes=2 * embeddings,
            rounds=-(-workload.num_prompts // stage.batch_size),
            round_s=line.step_s,
            waiting_s=line.waiting_s,
        ),
    )


def _decode_cost(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageCost:
    fmt, vae = FORMATS[stage.weight_format], model.vae
    dtype_bytes = DTYPE_BYTES[stage.compute_dtype]
    flops = decode_flops(vae, workload.width, workload.height)
    flops *= tiled_pixels_ratio(workload.width, workload.height, stage.tile_px)
    rate = CONVOLUTION_SHARE * compute_rate(hardware, stage.compute_dtype)
    picture = vae.out_channels * workload.width * workload.height * dtype_bytes
    return _assemble(
        stage,
        (),
        hardware,
        _Load(
            kept_bytes=fmt.plain_bytes(vae.decoder_weights),
            activation_bytes=decode_activation_bytes(vae, workload.width, workload.height, stage.tile_px, dtype_bytes),
            host_bytes=2 * workload.num_images * picture,
            rounds=workload.num_images,
            round_s=flops / rate + DECODER_OVERHEADS * hardware.block_overhead_s,
        ),
    )


def _assemble(stage: StagePlan, sizes: Sequence[int], hardware: Hardware, load: _Load) -> StageCost:
    """Add up what all stages share: placements, slots, host side, load time."""
    fmt = FORMATS[stage.weight_format]
    on_host = hardware.device == "cpu"
    at: dict[Placement, int] = dict.fromkeys(Placement, 0)
    resident_largest = streamed_largest = 0
    for (placement, size), count in Counter(zip(stage.block_placements, sizes, strict=True)).items():
        at[placement] += count * size
        if placement is Placement.GPU:
            resident_largest = max(resident_largest, size)
        else:
            streamed_largest = max(streamed_largest, size)
    resident = at[Placement.GPU] + load.kept_bytes
    slots = stage.slots * streamed_largest
    # The once-per-generation weights come before any block: they count where they need more than what follows.
    activation = max(load.activation_bytes, load.once_bytes - at[Placement.GPU] - slots)
    margin = margin_bytes(activation, resident + slots)
    pinned = at[Placement.PINNED]
    ring = slots if at[Placement.DISK] and not on_host else 0
    host = LIBRARIES_HOST_BYTES + READ_BUFFER_BYTES + load.host_bytes + at[Placement.PAGEABLE]
    if on_host:
        host += resident + slots + activation + margin
    else:
        # Before the arenas exist, resident blocks pass through two host buffers, and embedders through one.
        passing = max(ring + 2 * resident_largest, load.once_staging_bytes)
        host += CUDA_HOST_BYTES + max(0, passing - (pinned + ring + at[Placement.PAGEABLE]))
    loaded = resident + load.once_bytes + pinned + at[Placement.PAGEABLE]
    load_s = STAGE_SETUP_S + loaded / hardware.disk_read_bytes_per_s
    if not on_host:
        # One block is copied to the device while the next is read.
        load_s = max(load_s, STAGE_SETUP_S + resident / hardware.h2d_pageable_bytes_per_s)
        load_s += (pinned + ring) / hardware.pin_bytes_per_s
    run_s = load.rounds * load.round_s
    streamed = sum(at.values()) - at[Placement.GPU]
    return StageCost(
        resident_bytes=resident,
        slot_bytes=slots,
        activation_bytes=activation,
        margin_bytes=margin,
        context_bytes=0 if on_host else hardware.context_bytes,
        host_pinned_bytes=pinned + ring,
        host_bytes=host,
        disk_bytes=loaded + load.rounds * at[Placement.DISK],
        h2d_bytes=0 if on_host else resident + load.rounds * streamed,
        load_s=load_s,
        run_s=run_s,
        time_s=load_s + run_s,
        waiting_s=load.rounds * load.waiting_s,
        first_read_s=min(load_s + run_s, (loaded + at[Placement.DISK]) / hardware.disk_read_bytes_per_s),
        fidelity_error=fmt.weight_error,
        fidelity_provenance=fmt.provenance,
        on_host=on_host,
    )
