"""Peak live activations of each stage, in closed form: which tensors live at which moment of the libraries' forwards.

A formula is the largest of a few *moments*, each the sum of the tensors that live then. ``runtime.simulate`` finds the
same peaks by running the modules on fake tensors; both agree within 3 % (tests, ``benchmarks/cost_accuracy.py``).
Neither has the allocator's rounding to 512 bytes in common with a margin: that is ``cost.margin_bytes``.

Sizes below are elements of the compute dtype unless they say bytes. A quantized Linear holds its weight W expanded
while it runs, and ``scratch`` bytes a weight besides while expanding it, before its output exists. One that multiplies
integers expands nothing; beside its output it holds the pieces it is at (``WeightFormat.pieces_bytes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem_flux2.planning.adapters import once_bytes, product_bytes
from lowmem_flux2.planning.chunks import chunk_bounds, largest_chunk
from lowmem_flux2.planning.formats import WeightFormat
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.reference_keys import BLENDED_WIDTHS, RESTING_WIDTHS, kept_keys_bytes
from lowmem_flux2.planning.tiles import tile_starts
from lowmem_flux2.planning.vae_spec import VaeSpec
from lowmem_flux2.planning.workload import Workload

FP32_BYTES = 4
INT64_BYTES = 8
MODULATION_WIDTHS = 16
"""Hidden sizes kept per step: the embedding, 2 x 6 modulations of a double-stream block, 3 of a single-stream block."""


@dataclass(frozen=True, slots=True)
class Expansion:
    """Bytes that one weight of a Linear takes while it runs, and at most while it is expanded; 0 where it is not.

    ``beside``: what expanding takes besides, whatever the Linear's size.
    """

    fmt: WeightFormat
    expanded: float
    expanding: float
    beside: int = 0

    @staticmethod
    def of(fmt: WeightFormat, dtype_bytes: int) -> Expansion:
        if not fmt.is_quantized or fmt.compute_class:
            return Expansion(fmt, 0, 0)
        return Expansion(fmt, dtype_bytes, dtype_bytes + fmt.scratch_bytes_per_weight, fmt.scratch_bytes)

    def linear_bytes(self, held: float, rows: int, columns: int, tokens: float, output: float) -> float:
        """The peak of one Linear: ``held`` bytes live throughout, its input among them, ``output`` bytes are made."""
        weights, pieces = rows * columns, self.fmt.pieces_bytes(rows, columns, tokens)
        return held + max(weights * self.expanding + self.beside, weights * self.expanded + output + pieces)


def denoise_activation_bytes(
    model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int, chunk: int, fmt: WeightFormat
) -> int:
    """Peak of one step over ``batch`` images: the largest moment of a block, and what lives through all of them.

    Args:
        chunk: tokens of a chunk; 0 for whole sequences.
    """
    dims, expansion = model.transformer, Expansion.of(fmt, dtype_bytes)
    kept, h = kept_keys_bytes(model, workload, batch, dtype_bytes), dims.hidden_size
    sizes = _BlockSizes(h, dims.mlp_size, dims.num_heads, dtype_bytes, batch * workload.sequence_tokens)
    keys = _Keys(kept, kept * (len(dims.blocks) - 1) // len(dims.blocks)) if kept else _Keys()
    blended = replace(keys, widths=BLENDED_WIDTHS) if kept else keys
    at_once = sizes.joint
    if chunk:
        longest, stream = _longest_chunks(workload, workload.sequence_tokens, batch, chunk)
        at_once, peak = longest, _chunked_block_bytes(sizes, longest, stream, expansion, keys)
        if kept:
            mixed = batch * _longest_mixed_chunk(workload, chunk)
            later = sizes._replace(joint=batch * workload.step_tokens)
            theirs = 2 * h * batch * workload.reference_tokens * dtype_bytes  # keys and values in a later step's own
            chunks = _longest_chunks(workload, workload.step_tokens, batch, chunk)
            peak = max(
                peak,
                _chunked_block_bytes(sizes, mixed, mixed, expansion, blended),
                _chunked_block_bytes(later, *chunks, expansion, _Keys(kept, kept)) + theirs,
            )
    else:
        peak = _block_bytes(sizes, expansion, blended)
    # Beside a LoRA's Linear's output; small, so it counts at every moment.
    peak += product_bytes(workload.adapters, at_once, dtype_bytes)
    return round(peak) + _kept_bytes(model, workload, batch, dtype_bytes)


def _longest_chunks(workload: Workload, tokens: int, batch: int, chunk: int) -> tuple[int, int]:
    """Of so many tokens of an image: of the joint sequence, and of the longer stream's; over the batch."""
    text = workload.text_tokens
    stream = max(largest_chunk(tokens - text, chunk), largest_chunk(text, chunk))
    return batch * largest_chunk(tokens, chunk), batch * stream


def _longest_mixed_chunk(workload: Workload, chunk: int) -> int:
    """Tokens of the longest chunk that holds references and others; 0 where none does."""
    first, last = workload.text_tokens, workload.text_tokens + workload.reference_tokens
    bounds = chunk_bounds(workload.sequence_tokens, chunk)
    mixed = [stop - start for start, stop in bounds if start < first < stop or start < last < stop]
    return max(mixed, default=0)


@dataclass(frozen=True, slots=True)
class _Keys:
    """Keys and values of references that the last block's attention meets, and those that it finds, in bytes.

    ``widths``: hidden sizes that a token has of modulations of its own (``BLENDED_WIDTHS``).
    """

    met: int = 0
    found: int = 0
    widths: int = 0


class _BlockSizes(NamedTuple):
    """h, m, heads, bytes of the compute dtype, and tokens of the joint sequence, over the batch."""

    hidden: int
    mlp: int
    heads: int
    dtype_bytes: int
    joint: int


def _block_bytes(sizes: _BlockSizes, expansion: Expansion, keys: _Keys) -> float:
    """Whole sequences. With S tokens, a single-stream block (Flux2ParallelSelfAttnProcessor) holds its input and the
    modulated norm, 2h S, and then

    - projects: the fused projection (3h + 2m) S, of h (3h + 2m) weights. Its views keep it whole to the end;
    - rotates the key (apply_rotary_emb): beside it the rotated query and the normed key 2h S, the key's halves turned,
      h S, and three fp32 products, of which one is a mere view of the key where that is fp32 already;
    - concatenates: the rotated query and key 2h S, the attention's result h S, the gated MLP m S and both side by side,
      (h + m) S, of which the output projection, with h (h + m) weights, makes h S again, the first two being gone.

    The last is the largest, (9h + 4m) S, where weights are not expanded. A double-stream block stays below. Where keys
    of references are kept (Flux2KVParallelSelfAttnProcessor), attention's result lives until the end, h S.
    """
    h, m = sizes.hidden, sizes.mlp
    row = sizes.joint * sizes.dtype_bytes
    fp32 = (3 if sizes.dtype_bytes < FP32_BYTES else 2) * FP32_BYTES
    result = h * row if keys.met else 0
    before = max(
        expansion.linear_bytes(2 * h * row, 3 * h + 2 * m, h, sizes.joint, (3 * h + 2 * m) * row),
        (8 * h + 2 * m) * row + h * sizes.joint * fp32,
    )
    after = max(
        (9 * h + 4 * m) * row,
        expansion.linear_bytes((8 * h + 4 * m) * row + result, h, h + m, sizes.joint, h * row),
    )
    return keys.widths * h * row + max(keys.found + before, keys.met + after)


def _chunked_block_bytes(sizes: _BlockSizes, chunk: int, stream_chunk: int, expansion: Expansion, keys: _Keys) -> float:
    """Chunks, as ``runtime.chunking`` works them off: S joint tokens, C of their largest chunk, D of a stream's.

    A single-stream block fills query, key, value and the gated MLP beside its input, (4h + m) S. Of a chunk

    - it projects: the modulated norm h C, and (3h + 2m) C of it, with h (3h + 2m) weights;
    - rotates: beside the projection a normed head and its halves turned, 2h C, and three fp32 products, of which one
      is a mere view where that is fp32 already;
    - gates the MLP: beside the projection its non-linearity and the product, 2m C.

    Then attention makes h S, with its row sums in fp32, and the results are written over it: less than before.

    A double-stream block is larger only where nearly all tokens are of one stream that is one chunk: inputs and
    attention's result 2h S; of a chunk the stream's sum and its norm 2h D, and 4m D in the MLP, of 2h m weights.

    A chunk with references that are kept among others has modulations of its own, in a double-stream block of two sets.
    """
    h, m, b = sizes.hidden, sizes.mlp, sizes.dtype_bytes
    turning = 2 * b + 3 * FP32_BYTES if b < FP32_BYTES else 5 * FP32_BYTES
    projected, row_sums = (3 * h + 2 * m) * chunk * b, FP32_BYTES * sizes.heads * sizes.joint
    filled = (4 * h + m) * sizes.joint * b
    blended = keys.widths * h * b
    filling = filled + blended * chunk
    stream = 2 * h * (sizes.joint + stream_chunk) * b + 2 * blended * stream_chunk
    before = max(
        expansion.linear_bytes(filling + h * chunk * b, 3 * h + 2 * m, h, chunk, projected),
        filling + projected + max(turning * h, 2 * m * b) * chunk,
        expansion.linear_bytes(stream, 2 * m, h, stream_chunk, 2 * m * stream_chunk * b),
        stream + 4 * m * stream_chunk * b,
    )
    return max(keys.found + before, keys.met + filled + h * sizes.joint * b + row_sums)


def _kept_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
    """What lives through all blocks of a step besides theirs.

    The conditioning of the run; latents and the last step's prediction; with references their latents, joined to the
    image's, and a prediction for them too; two RoPE tables in fp32, of one image's tokens; and the
    hidden state of a pass that waits while the other one is computed.
    """
    dims = model.transformer
    image, references = batch * workload.image_tokens, batch * workload.reference_tokens
    times = 2 if workload.caches_references else 3  # whose velocity is of the image alone
    latents = 2 * image + (times * references + image if references else 0)
    waiting = (workload.guidance_passes - 1) * batch * workload.sequence_tokens * dims.hidden_size
    tokens = workload.sequence_tokens + (workload.step_tokens if workload.caches_references else 0)
    rope = 2 * tokens * dims.head_dim * FP32_BYTES
    kept = (latents * dims.in_channels + waiting) * dtype_bytes + rope
    return kept + conditioning_bytes(model, workload, batch, dtype_bytes)


def conditioning_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
    """What is computed once per generation and kept for all steps: projected texts and modulations.

    Modulations are those of each size of a batch. Batches of the same prompts share their text, and all of a size their
    negative one; no two prompts are taken to be alike.
    """
    repeats = max(workload.num_images // max(workload.num_prompts, 1), 1)
    prompts = [image // repeats for image in range(workload.num_images)]
    batches = {tuple(prompts[at : at + batch]) for at in range(0, len(prompts), batch)}
    sizes = sum({len(each) for each in batches})
    texts = sum(map(len, batches)) + (workload.guidance_passes - 1) * sizes
    values = texts * workload.text_tokens + sizes * workload.steps * MODULATION_WIDTHS
    values += sizes * RESTING_WIDTHS if workload.caches_references else 0
    return values * model.transformer.hidden_size * dtype_bytes


def conditioning_peak_bytes(model: ModelSpec, workload: Workload, batch: int, dtype_bytes: int) -> int:
    """Peak before any block is loaded, the embedders' weights apart: the last batch's text is projected, one pass.

    With the factors of LoRAs that the embedders have.
    """
    text = batch * workload.text_tokens * model.transformer.joint_dim
    factors = once_bytes(workload.adapters, dtype_bytes)
    return conditioning_bytes(model, workload, batch, dtype_bytes) + text * dtype_bytes + factors


def encode_activation_bytes(
    model: ModelSpec, workload: Workload, batches: Sequence[int], dtype_bytes: int, fmt: WeightFormat
) -> int:
    """Peak of one pass over the text encoder's used layers, which takes batches of so many prompts.

    With t tokens, hidden size h and intermediate size I, a layer of one batch holds its input, the residual and the
    norm, 3h t, and then in the MLP gate, up and their product, 3I t. Its three Linears have h I weights each: up runs
    beside the gate, down beside the product.

    Query heads are q wide, key and value heads k. Attention holds the input, its norm, query, key and value, rotated,
    key and value repeated to all heads, its result, and the mask once more, additive.

    The other batches' hidden states wait, and every batch's boolean mask, positions and rotary tables; tapped states
    wait on the host.
    """
    dims, length, b = model.text_encoder, workload.text_tokens, dtype_bytes
    h, i = dims.hidden_size, dims.intermediate_size
    q, kv = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    expansion = Expansion.of(fmt, dtype_bytes)
    largest = max(batches)
    row = largest * length * b
    held = 3 * h * row
    peak = max(
        held + 3 * i * row,
        expansion.linear_bytes(held + i * row, i, h, largest * length, i * row),
        expansion.linear_bytes(held + i * row, h, i, largest * length, h * row),
        held - h * row + (4 * q + 2 * kv) * row + largest * length**2 * b,
    )
    waiting = (sum(batches) - largest) * length * h * b
    tables = len(batches) * length * (2 * dims.head_dim * b + INT64_BYTES)
    return round(peak) + waiting + tables + sum(batches) * length**2


def decoder_channels(vae: VaeSpec) -> tuple[int, ...]:
    """Channels of the decoder's levels, from the latents up to the picture."""
    return tuple(reversed(vae.decoder_block_out_channels or vae.block_out_channels))


def _convolved(copies: float, given: int, made: int) -> float:
    """Elements that a convolution's kernel holds: of what it is given one copy, then of what it makes."""
    return min(copies, 1) * given + max(copies - 1, 0) * made


def _convolving(copies: float, channels_in: int, channels_out: int) -> float:
    """Channels that live in a level's resnets while they convolve: in the first one, and in a later one."""
    first = 2 * channels_in + channels_out + _convolved(copies, channels_in, channels_out)
    return max(first, channels_in + 3 * channels_out + _convolved(copies, channels_out, channels_out))


def _decoder_elements(vae: VaeSpec, width: int, height: int, copies: float) -> int:
    """Peak elements of decoding one tile, or picture, of ``width x height`` pixels.

    In an up-block's first resnet its input, its norm and its non-linearity live together, 3 x channels in; where
    channels change, at its end the input, its projection, the branch, their sum and the scaled sum. The widest is the
    last block (256 channels at full resolution: 1536 of the 1539 MiB at 1024 px). In its upsampler the interpolated
    picture and the convolved one, four times larger, beside the small one. And the latents after post_quant_conv.

    Where kernels make ``copies``, a convolution is the peak: what it is given and makes, and a block's input, which its
    caller still has.
    """
    channels = decoder_channels(vae)
    peak = 0.0
    for level, channels_out in enumerate(channels):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        pixels = (width // shrink) * (height // shrink)
        resnet: float = max(3 * channels_in, channels_in + 4 * channels_out, 4 * channels_out)
        upsampler: float = 9 * channels_out if level < len(channels) - 1 else 0
        if copies:
            resnet = max(resnet, _convolving(copies, channels_in, channels_out))
            if upsampler:
                upsampler += channels_in + _convolved(copies, 4 * channels_out, 4 * channels_out)
        peak = max(peak, pixels * max(resnet, upsampler))
    return round(peak) + vae.latent_channels * (width // vae.spatial_factor) * (height // vae.spatial_factor)


def _encoder_elements(vae: VaeSpec, width: int, height: int, copies: float) -> int:
    """Peak elements of encoding one tile, or picture, of ``width x height`` pixels; the picture itself apart.

    The levels of ``_decoder_elements`` from the picture down to the latents. While a level's later resnet ends, the
    level's input is still there. The downsampler pads its input to a copy of it.
    """
    widths = vae.block_out_channels
    peak = 0.0
    for level, channels_out in enumerate(widths):
        channels_in = widths[max(level - 1, 0)]
        pixels = (width >> level) * (height >> level)
        resnet: float = max(3 * channels_in, channels_in + 4 * channels_out)
        if copies:
            resnet = max(resnet, _convolving(copies, channels_in, channels_out))
        peak = max(peak, pixels * resnet)
    return round(peak)


def reference_activation_bytes(
    vae: VaeSpec, sizes: Sequence[tuple[int, int]], tile_px: int, dtype_bytes: int, copies: float = 0
) -> int:
    """Peak of encoding pictures of these (width, height), one after another, each moved off the device before the next.

    ``copies`` as in ``decode_activation_bytes``. Tiled, the moments of all finished tiles lie there, at 1/8 of the
    side: little beside the tile that is encoded.
    """
    peak = 0
    for width, height in sizes:
        picture = vae.in_channels * width * height
        tile_w, tile_h, finished = width, height, 0
        if tile_px and max(width, height) > tile_px:
            tile_w, tile_h = min(width, tile_px), min(height, tile_px)
            down, across = (sum(length for _, length in tile_starts(side, tile_px)) for side in (height, width))
            finished = 2 * vae.latent_channels * down * across
        peak = max(peak, picture + finished + _encoder_elements(vae, tile_w, tile_h, copies))
    return peak * dtype_bytes


def reference_host_bytes(vae: VaeSpec, workload: Workload, dtype_bytes: int, on_host: bool) -> int:
    """What the host holds while reference images are encoded: all of them in 8 bits, the latents of all, and beside a
    GPU the one that goes there in fp32; or in the end the latents twice, when they are joined."""
    values = [vae.in_channels * width * height for width, height in workload.references]
    latents = workload.reference_tokens * vae.packed_channels * dtype_bytes
    ids = workload.reference_tokens * 4 * INT64_BYTES
    if on_host:  # where it is an activation
        return sum(values) + latents
    return sum(values) + max(2 * (latents + ids), latents + max(values) * FP32_BYTES)


def decode_activation_bytes(vae: VaeSpec, workload: Workload, tile_px: int, dtype_bytes: int, copies: float = 0) -> int:
    """Peak of decoding all images, one after another.

    Args:
        copies: with what kernels of convolutions hold: ``Hardware.convolution_copies``; 0 for tensors alone.

    All latents are unpacked first: packed, scaled, and unpatchified copies live together. Then they lie there.

    Tiled, every finished tile (3 channels) is kept until the picture is stitched: the peak is the last tile of the
    largest size, with all that came before it, or the stitching, where all tiles, the rows made of them and the picture
    live together.
    """
    width, height = workload.width, workload.height
    latents = workload.num_images * workload.image_tokens * vae.packed_channels
    if not tile_px:
        return max(_decoder_elements(vae, width, height, copies) + latents, 3 * latents) * dtype_bytes
    down, across = (
        [length * vae.spatial_factor for _, length in tile_starts(side, tile_px)] for side in (height, width)
    )
    peak = 0
    for tile_h in set(down):
        row = len(down) - 1 - down[::-1].index(tile_h)
        for tile_w in set(across):
            column = len(across) - 1 - across[::-1].index(tile_w)
            finished = sum(down[:row]) * sum(across) + tile_h * sum(across[:column])
            peak = max(peak, _decoder_elements(vae, tile_w, tile_h, copies) + vae.out_channels * finished)
    stitching = vae.out_channels * (sum(down) * sum(across) + 2 * width * height)
    return max(max(peak, stitching) + latents, 3 * latents) * dtype_bytes


def decode_host_bytes(vae: VaeSpec, workload: Workload, dtype_bytes: int) -> int:
    """What the host keeps at the end of decoding on a GPU: all latents, packed and unpacked, and all pictures.

    Every picture lies there twice when they are joined; or, of a single one, with the bytes of asking whether it is
    finite: its absolute values, and three booleans an element.
    """
    latents = workload.num_images * workload.image_tokens * vae.packed_channels * dtype_bytes
    picture = vae.out_channels * workload.width * workload.height
    pictures = workload.num_images * picture * dtype_bytes
    return 2 * latents + pictures + max(pictures, picture * (dtype_bytes + 3))
