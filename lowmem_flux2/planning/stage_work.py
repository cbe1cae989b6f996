"""What a stage loads, computes and holds, but for where its blocks rest: (StagePlan, workload, ...) -> StageWork.

No torch, no policy. ``cost`` adds the placements and prices it all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypedDict

from lowmem_flux2.planning.activations import (
    conditioning_peak_bytes,
    decode_activation_bytes,
    decode_host_bytes,
    denoise_activation_bytes,
    encode_activation_bytes,
    reference_activation_bytes,
    reference_host_bytes,
)
from lowmem_flux2.planning.adapters import kept_bytes
from lowmem_flux2.planning.batches import batch_sizes, batches_a_pass
from lowmem_flux2.planning.block_times import block_times
from lowmem_flux2.planning.expansion import expand_seconds, reading_seconds
from lowmem_flux2.planning.file_bytes import (
    block_file_bytes,
    file_form,
    other_file_bytes,
    text_file_bytes,
    transformer_file_bytes,
    vae_file_bytes,
    writer_file_bytes,
)
from lowmem_flux2.planning.flops import (
    DECODER_OVERHEADS,
    ENCODER_OVERHEADS,
    STEP_OVERHEADS,
    compute_rate,
    compute_seconds,
    decode_flops,
    encode_picture_flops,
    layer_flops,
    low_rank_flops,
)
from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS, GGUF, MIXED, WeightFormat
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.mixed import mixed_blocks
from lowmem_flux2.planning.models import BlockSpec, ModelSpec, TransformerSpec
from lowmem_flux2.planning.passages import AS_HELD, FileForm
from lowmem_flux2.planning.plan import ONE_BY_ONE, StagePlan
from lowmem_flux2.planning.step_caches import steps_taken
from lowmem_flux2.planning.tiles import tiled_pixels_ratio
from lowmem_flux2.planning.timeline import nanoseconds
from lowmem_flux2.planning.upsampling import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    cache_bytes,
    seeing_bytes,
    seeing_flops,
    token_activation_bytes,
    token_flops,
)
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

REFERENCE_ID_BYTES = 4 * 8
"""Of a reference token on the host: its position along four axes, in 64 bits each."""


HEAPS_BYTES = 128 * MIB
"""On a CPU, about so much freed memory lies between pieces that stay: glibc keeps freed pieces under 8 MiB in its heaps
(``runtime.device.KEPT_PIECE_BYTES``), so activations come to lie beside what earlier ones left. With klein-4b's
shapes 98 to 125 MiB at 256x256, 144 to 167 at 512x512, 80 to 95 at 1024x1024 in denoising, 28 to 92 in decoding
(measured 2026-11-27 on a Xeon with AMX, whose matmuls lay some MiB out anew: they are in these)."""


class _BeforeWeights(TypedDict):
    first_ns: int
    process_bytes: int
    overhead_bytes: int


@dataclass(frozen=True, slots=True)
class StageWork:
    """A stage but for where its blocks rest: what it loads, computes and holds. Bytes and nanoseconds.

    Args:
        block_bytes: stored bytes of each block, in the order of use.
        compute_ns: of each block in one round, all guidance passes together, its weights' expansion included.
        expand_ns: of that, the expansion of all blocks' weights.
        between_ns: computed once a round outside the blocks.
        rounds: passes over the blocks.
        first_ns: computed besides: what the first round takes longer, and the steps that a step cache stands for.
        process_bytes: RAM of the process before it holds any weight.
        overhead_bytes: device memory beyond tensors.
        kept_bytes: non-block weights that stay on the device for the whole stage.
        activation_bytes: with the weights of a quantized format that are expanded at the peak.
        workspace_bytes: by which kernels' own memory makes the peak higher.
        once_bytes: weights and tensors that live on the device before any block is loaded, and are dropped again.
        passing_bytes: RAM that is needed while neither arenas nor results are there: embedders pass through it, or the
            joined results come to lie there.
        host_bytes: tensors that the stage is given in RAM.
        result_bytes: tensors that it makes there beside the arenas.
        block_file_bytes: of each block in its file: the prepared store's, or the checkpoint's in its own dtype.
        file_form: these beside ``block_bytes``, paddings apart.
        other_file_bytes: all that is read beside blocks, from the checkpoint.
    """

    block_bytes: tuple[int, ...]
    compute_ns: tuple[int, ...]
    between_ns: int
    rounds: int
    first_ns: int
    process_bytes: int
    overhead_bytes: int
    kept_bytes: int
    activation_bytes: int
    workspace_bytes: int = 0
    expand_ns: int = 0
    once_bytes: int = 0
    passing_bytes: int = 0
    host_bytes: int = 0
    result_bytes: int = 0
    block_file_bytes: tuple[int, ...] = ()
    file_form: FileForm = AS_HELD
    other_file_bytes: int = 0


def stage_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    """All that does not depend on the stage's placements and slots."""
    work = _work(stage, model, workload, hardware)
    if hardware.device == "cpu":
        return replace(work, overhead_bytes=work.overhead_bytes + min(work.activation_bytes, HEAPS_BYTES))
    return work


def _work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    if stage.stage == "upsample":
        return _upsample_work(stage, model, workload, hardware)
    if stage.stage == "encode":
        return _encode_work(stage, model, workload, hardware)
    if stage.stage == "denoise":
        return _denoise_work(stage, model, workload, hardware)
    if stage.stage == "reference":
        return _reference_work(stage, model, workload, hardware)
    return _decode_work(stage, model, workload, hardware)


def before_weights(hardware: Hardware) -> _BeforeWeights:
    cuda = hardware.cuda_host_bytes if hardware.device == "cuda" else 0
    return {
        "first_ns": nanoseconds(hardware.first_pass_s, 1),
        "process_bytes": hardware.libraries_host_bytes + cuda,
        "overhead_bytes": hardware.allocator_overhead_bytes,
    }


def block_sizes(stage: StagePlan, model: ModelSpec) -> list[int]:
    """Stored bytes of each block of the stage's component in its weight format, in the order of use."""
    fmt, dtype_bytes = FORMATS[stage.weight_format], DTYPE_BYTES[stage.compute_dtype]
    if stage.stage in ONE_BY_ONE:
        return []
    if stage.component == "text_encoder":
        text = model.text_encoder
        if stage.stage == "encode" and text.packed and stage.weight_format == GGUF:
            return [fmt.block_bytes(layer, dtype_bytes) for layer in text.blocks]
        layers = text.num_layers if stage.stage == "upsample" else text.layers_used
        return [fmt.block_bytes(text.layer, dtype_bytes)] * layers
    dims = model.transformer
    if stage.weight_format == MIXED or (dims.packed and stage.weight_format == GGUF):
        return [fmt.block_bytes(block, dtype_bytes) for block in transformer_blocks(stage, dims)]
    doubles, singles = (fmt.block_bytes(block, dtype_bytes) for block in (dims.double_block, dims.single_block))
    return [doubles] * dims.num_double + [singles] * dims.num_single


def transformer_blocks(stage: StagePlan, dims: TransformerSpec) -> tuple[BlockSpec, ...]:
    """As they are in the stage's weight format."""
    return mixed_blocks(dims) if stage.weight_format == MIXED else dims.blocks


def _denoise_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    fmt, dims = FORMATS[stage.weight_format], model.transformer
    dtype_bytes, batch, passes = DTYPE_BYTES[stage.compute_dtype], stage.batch_size, workload.guidance_passes
    overhead_s = hardware.block_overhead_s
    (double_ns, single_ns), expand_s = block_times(stage, model, workload, hardware)
    text_input = passes * workload.text_tokens * dims.joint_dim * dtype_bytes
    largest_embedder = max(6 * dims.hidden_size, dims.joint_dim) * dims.hidden_size
    noise = workload.num_images * workload.image_tokens * dims.in_channels * dtype_bytes
    references = workload.reference_tokens * (dims.in_channels * dtype_bytes + REFERENCE_ID_BYTES)
    low_rank_s = passes * low_rank_flops(workload, batch) / compute_rate(hardware, stage.compute_dtype)
    batches = -(-workload.num_images // batch)
    taken = steps_taken(stage.step_cache, model, workload, batch, dtype_bytes)
    skipped_ns = nanoseconds(STEP_OVERHEADS * overhead_s, 1) + taken.first_blocks * double_ns
    before = before_weights(hardware)
    before["first_ns"] += batches * taken.skipped * skipped_ns
    if workload.caches_references:  # as if no copy hid behind what each batch's first step computes more
        (first_double_ns, first_single_ns), _ = block_times(stage, model, workload, hardware, is_first=True)
        more_ns = dims.num_double * (first_double_ns - double_ns) + dims.num_single * (first_single_ns - single_ns)
        before["first_ns"] += batches * more_ns
    return StageWork(
        block_bytes=tuple(block_sizes(stage, model)),
        compute_ns=(double_ns,) * dims.num_double + (single_ns,) * dims.num_single,
        expand_ns=nanoseconds(dims.num_double * expand_s[0] + dims.num_single * expand_s[1], 1),
        between_ns=nanoseconds(STEP_OVERHEADS * overhead_s + low_rank_s, 1),
        rounds=batches * taken.computed,
        **before,
        kept_bytes=fmt.plain_bytes(dims.remaining_non_block_weights, dtype_bytes)
        + kept_bytes(workload.adapters, dtype_bytes),
        activation_bytes=denoise_activation_bytes(model, workload, batch, dtype_bytes, stage.chunk_tokens, fmt)
        + taken.kept_bytes,
        once_bytes=fmt.plain_bytes(dims.conditioning_weights, dtype_bytes)
        + conditioning_peak_bytes(model, workload, batch, dtype_bytes),
        passing_bytes=fmt.plain_bytes(largest_embedder, dtype_bytes),
        host_bytes=workload.num_images * text_input + noise + references,
        result_bytes=2 * noise,  # each batch's, and all joined
        block_file_bytes=block_file_bytes(stage, model, transformer_blocks(stage, dims)),
        file_form=file_form(stage, model),
        other_file_bytes=transformer_file_bytes(model) + kept_bytes(workload.adapters, dtype_bytes),
    )


def _upsample_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    """A round is one token of every prompt, the first one with all of the prompt before it; as if none ended early.

    What sees reference images is loaded, run and dropped before any layer is there.
    """
    fmt, dims, prompts = _of_layers(stage), model.text_encoder, stage.batch_size
    dtype_bytes, padded = DTYPE_BYTES[stage.compute_dtype], replace(workload, text_tokens=PROMPT_TOKENS)
    weights = dims.layer.linear_weights
    expand_s = expand_seconds(hardware, fmt, dtype_bytes, weights)
    overheads_s = hardware.layer_overheads * hardware.block_overhead_s
    token_ns, prompt_ns = (
        nanoseconds(
            max(
                compute_seconds(hardware, stage.compute_dtype, linear, 0, fmt, 0),
                reading_seconds(hardware, dtype_bytes, weights),
            )
            + compute_seconds(hardware, stage.compute_dtype, 0, attention, fmt, 0)
            + expand_s
            + overheads_s,
            1,
        )
        for linear, attention in (token_flops(dims, prompts), layer_flops(model, padded, prompts))
    )
    before = before_weights(hardware)
    # Whole, though the first token comes with it: what it takes longer than a token grows as tokens take less.
    before["first_ns"] += dims.num_layers * prompt_ns
    head = fmt.plain_bytes(dims.embedding_weights, dtype_bytes)
    head_s = max(
        2 * prompts * dims.embedding_weights / compute_rate(hardware, stage.compute_dtype),
        reading_seconds(hardware, dtype_bytes, dims.embedding_weights),
    )
    prompt_bytes = encode_activation_bytes(model, padded, (prompts,), dtype_bytes, fmt)
    once_bytes = seen_file_bytes = 0
    if workload.references and (vision := dims.vision) is not None:
        once_bytes = seeing_bytes(vision, dims.hidden_size, dtype_bytes)
        seen_file_bytes = other_file_bytes(model, "text_encoder", vision.weights)
        before["first_ns"] += nanoseconds(compute_seconds(hardware, stage.compute_dtype, *seeing_flops(vision), fmt), 1)
    return StageWork(
        block_bytes=tuple(block_sizes(stage, model)),
        compute_ns=(token_ns,) * dims.num_layers,
        expand_ns=nanoseconds(dims.num_layers * expand_s, 1),
        between_ns=nanoseconds(head_s + STEP_OVERHEADS * hardware.block_overhead_s, 1),
        rounds=NEW_TOKENS,
        **before,
        kept_bytes=head + fmt.plain_bytes(dims.hidden_size, dtype_bytes),
        activation_bytes=max(
            prompt_bytes + cache_bytes(dims, prompts, PROMPT_TOKENS, dtype_bytes),
            token_activation_bytes(dims, prompts, dtype_bytes, fmt),
        ),
        once_bytes=once_bytes,
        passing_bytes=head,
        block_file_bytes=block_file_bytes(stage, model, (dims.layer,) * dims.num_layers),
        file_form=file_form(stage, model),
        other_file_bytes=writer_file_bytes(model, prompts * (PROMPT_TOKENS + NEW_TOKENS)) + seen_file_bytes,
    )


def convolution_copies(stage: StagePlan, hardware: Hardware) -> float:
    """Of an fp32 convolution oneDNN copies what it is given alone; what TF32 kernels do is not known."""
    is_plain = hardware.device == "cpu" and stage.compute_dtype == "fp32"
    return min(hardware.convolution_copies, 1) if is_plain else hardware.convolution_copies


def _of_layers(stage: StagePlan) -> WeightFormat:
    """A text encoder's layers have 4 bits in nf4-mixed, all of them."""
    return FORMATS["nf4" if stage.weight_format == MIXED else stage.weight_format]


def _encode_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    fmt, dims = _of_layers(stage), model.text_encoder
    dtype_bytes, length = DTYPE_BYTES[stage.compute_dtype], workload.text_tokens
    sizes = batch_sizes(workload, stage.batch_size)[stage.cached_batches :]
    most = batches_a_pass(dims, stage.batch_size, length, dtype_bytes)
    passes = [tuple(sizes[at : at + most]) for at in range(0, len(sizes), most)]
    dtype, overheads = stage.compute_dtype, hardware.layer_overheads
    batches_s = sum(
        compute_seconds(hardware, dtype, *layer_flops(model, workload, prompts), fmt, overheads) for prompts in sizes
    )
    expand_s = len(sizes) * expand_seconds(hardware, fmt, dtype_bytes, dims.layer.linear_weights)
    layer_ns = nanoseconds((batches_s + expand_s) / max(len(passes), 1), 1)
    embedding = length * dims.joint_dim * dtype_bytes
    live = [
        encode_activation_bytes(model, workload, each, dtype_bytes, fmt) for each in passes or [(stage.batch_size,)]
    ]
    # The tapped states of a pass come to the host first, then a batch's are laid side by side.
    made = float((sum(sizes) + max(sizes, default=0)) * embedding)
    # In the end a pass's rows are joined, and where a prompt has several images repeated, one pass after the other.
    joined = workload.guidance_passes * workload.num_images
    joined += workload.num_prompts if workload.num_images > workload.num_prompts else 0
    if hardware.device == "cpu":
        # There they lie in the memory of the activations, and the last tapped is still the batch's hidden state when a
        # pass peaks; normed, it is another tensor.
        is_normed = dims.num_layers == dims.layers_used
        shared = [(max(each) if is_normed else sum(each)) / len(dims.out_layers) for each in passes]
        there = accumulate(map(sum, passes))
        peaks = [at + (count - less) * embedding for at, count, less in zip(live, there, shared, strict=False)]
        made = max(peaks, default=0) - max(live)
    return StageWork(
        block_bytes=tuple(block_sizes(stage, model)),
        compute_ns=(layer_ns,) * dims.layers_used,
        expand_ns=nanoseconds(dims.layers_used * expand_s / max(len(passes), 1), 1),
        between_ns=0,
        **before_weights(hardware),
        rounds=len(passes),
        kept_bytes=0,  # the embedding stays in its file: only the prompts' rows are read
        activation_bytes=max(live),
        passing_bytes=(sum(sizes) + joined) * embedding,  # no block left
        result_bytes=round(made),
        block_file_bytes=block_file_bytes(stage, model, dims.blocks),
        file_form=file_form(stage, model),
        other_file_bytes=text_file_bytes(model, sum(sizes) * length),
    )


def _reference_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    """A round is one reference image; of several sizes, one of the mean time."""
    fmt, vae = FORMATS[stage.weight_format], model.vae
    dtype_bytes = DTYPE_BYTES[stage.compute_dtype]
    flops = sum(
        encode_picture_flops(vae, *size) * tiled_pixels_ratio(*size, stage.tile_px) for size in workload.references
    )
    rate = hardware.convolution_share * compute_rate(hardware, stage.compute_dtype)
    count = len(workload.references)
    asked = (vae, workload.references, stage.tile_px, dtype_bytes)
    activations = reference_activation_bytes(*asked)
    return StageWork(
        block_bytes=(),
        compute_ns=(),
        between_ns=nanoseconds(flops / count / rate + ENCODER_OVERHEADS * hardware.block_overhead_s, 1),
        rounds=count,
        **before_weights(hardware),
        kept_bytes=fmt.plain_bytes(vae.encoder_weights, dtype_bytes),
        passing_bytes=fmt.plain_bytes(vae.largest_encoder_weights, dtype_bytes),
        activation_bytes=activations,
        workspace_bytes=reference_activation_bytes(*asked, convolution_copies(stage, hardware)) - activations,
        result_bytes=reference_host_bytes(vae, workload, dtype_bytes, hardware.device == "cpu"),
        other_file_bytes=vae_file_bytes(model, vae.encoder_weights),
    )


def _decode_work(stage: StagePlan, model: ModelSpec, workload: Workload, hardware: Hardware) -> StageWork:
    fmt, vae, dtype_bytes = FORMATS[stage.weight_format], model.vae, DTYPE_BYTES[stage.compute_dtype]
    flops = decode_flops(vae, workload.width, workload.height)
    flops *= tiled_pixels_ratio(workload.width, workload.height, stage.tile_px)
    rate = hardware.convolution_share * compute_rate(hardware, stage.compute_dtype)
    picture = vae.out_channels * workload.width * workload.height * dtype_bytes
    asked = (vae, workload, stage.tile_px, dtype_bytes)
    activations = decode_activation_bytes(*asked)
    host = decode_host_bytes(vae, workload, dtype_bytes)
    if hardware.device == "cpu":  # where pictures are joined after the last is decoded
        latents = workload.num_images * workload.image_tokens * vae.packed_channels * dtype_bytes
        host = max(latents + (workload.num_images - 1) * picture, host - activations)
    return StageWork(
        block_bytes=(),
        compute_ns=(),
        between_ns=nanoseconds(flops / rate + DECODER_OVERHEADS * hardware.block_overhead_s, 1),
        rounds=workload.num_images,
        **before_weights(hardware),
        kept_bytes=fmt.plain_bytes(vae.decoder_weights, dtype_bytes),
        activation_bytes=activations,
        workspace_bytes=decode_activation_bytes(*asked, convolution_copies(stage, hardware)) - activations,
        result_bytes=host,
        other_file_bytes=vae_file_bytes(model, vae.decoder_weights),
    )
