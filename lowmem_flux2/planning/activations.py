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
from dataclasses import dataclass
from typing import NamedTuple

from lowmem_flux2.planning.adapters import once_bytes, product_bytes
from lowmem_flux2.planning.chunks import largest_chunk
from lowmem_flux2.planning.formats import WeightFormat
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.reference_keys import BLENDED_WIDTHS, kept_keys_bytes
from lowmem_flux2.planning.reference_keys import MODULATION_WIDTHS as RESTING_WIDTHS
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
    dims = model.transformer
    expansion = Expansion.of(fmt, dtype_bytes)
    sizes = _BlockSizes(
        hidden=dims.hidden_size,
        mlp=dims.mlp_size,
        dtype_bytes=dtype_bytes,
        joint=batch * workload.sequence_tokens,
        image=batch * (workload.image_tokens + workload.reference_tokens),
        text=batch * workload.text_tokens,
    )
    at_once = sizes.joint
    if chunk:
        at_once, image, text = (
            batch * largest_chunk(tokens // batch, chunk) for tokens in (sizes.joint, sizes.image, sizes.text)
        )
        row_sums = FP32_BYTES * dims.num_heads * sizes.joint
        peak = _chunked_block_bytes(sizes, at_once, max(image, text), row_sums, expansion)
    else:
        peak = _block_bytes(sizes, expansion)
    if workload.caches_references:  # that of the first step, in the last blocks
        peak += BLENDED_WIDTHS * dims.hidden_size * at_once * dtype_bytes
        peak += kept_keys_bytes(model, workload, batch, dtype_bytes)
    # Beside a LoRA's Linear's output; small, so it counts at every moment.
    peak += product_bytes(workload.adapters, at_once, dtype_bytes)
    return round(peak) + _kept_bytes(model, workload, batch, dtype_bytes)


class _BlockSizes(NamedTuple):
    """h, m, bytes of the compute dtype, and tokens of the joint sequence and of each stream, over the batch."""

    hidden: int
    mlp: int
    dtype_bytes: int
    joint: int
    image: int
    text: int


def _block_bytes(sizes: _BlockSizes, expansion: Expansion) -> float:
    """Whole sequences. With S tokens, a single-stream block (Flux2ParallelSelfAttnProcessor) holds its input and the
    modulated norm, 2h S, and then

    - projects: the fused projection (3h + 2m) S, of h (3h + 2m) weights. Its views keep it whole to the end;
    - rotates the key (apply_rotary_emb): beside it the rotated query and the normed key 2h S, the key's halves turned,
      h S, and three fp32 products, of which one is a mere view of the key where that is fp32 already;
    - concatenates: the rotated query and key 2h S, the attention's result h S, the gated MLP m S and both side by side,
      (h + m) S, of which the output projection, with h (h + m) weights, makes h S again, the first two being gone.

    The last is the largest, (9h + 4m) S, where weights are not expanded. A double-stream block stays below.
    """
    h, m = sizes.hidden, sizes.mlp
    row = sizes.joint * sizes.dtype_bytes
    fp32 = (3 if sizes.dtype_bytes < FP32_BYTES else 2) * FP32_BYTES
    return max(
        expansion.linear_bytes(2 * h * row, 3 * h + 2 * m, h, sizes.joint, (3 * h + 2 * m) * row),
        (8 * h + 2 * m) * row + h * sizes.joint * fp32,
        (9 * h + 4 * m) * row,
        expansion.linear_bytes((8 * h + 4 * m) * row, h, h + m, sizes.joint, h * row),
    )


def _chunked_block_bytes(
    sizes: _BlockSizes, chunk: int, stream_chunk: int, row_sums: int, expansion: Expansion
) -> float:
    """Chunks, as ``runtime.chunking`` works them off: S joint tokens, C of their largest chunk, D of a stream's.

    A single-stream block fills query, key, value and the gated MLP beside its input, (4h + m) S. Of a chunk

    - it projects: the modulated norm h C, and (3h + 2m) C of it, with h (3h + 2m) weights;
    - rotates: beside the projection a normed head and its halves turned, 2h C, and three fp32 products, of which one
      is a mere view where that is fp32 already;
    - gates the MLP: beside the projection its non-linearity and the product, 2m C.

    Then attention makes h S, with its row sums in fp32, and the results are written over it: less than before.

    A double-stream block is larger only where nearly all tokens are of one stream that is one chunk: inputs and
    attention's result 2h S; of a chunk the stream's sum and its norm 2h D, and 4m D in the MLP, of 2h m weights.
    """
    h, m, b = sizes.hidden, sizes.mlp, sizes.dtype_bytes
    turning = 2 * b + 3 * FP32_BYTES if b < FP32_BYTES else 5 * FP32_BYTES
    projected = (3 * h + 2 * m) * chunk * b
    filled = (4 * h + m) * sizes.joint * b
    stream = 2 * h * (sizes.joint + stream_chunk) * b
    return max(
        expansion.linear_bytes(filled + h * chunk * b, 3 * h + 2 * m, h, chunk, projected),
        filled + projected + max(turning * h, 2 * m * b) * chunk,
        filled + h * sizes.joint * b + row_sums,
        expansion.linear_bytes(stream, 2 * m, h, stream_chunk, 2 * m * stream_chunk * b),
        stream + 4 * m * stream_chunk * b,
    )


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


def _decoder_elements(vae: VaeSpec, width: int, height: int) -> int:
    """Peak elements of decoding one tile, or picture, of ``width x height`` pixels.

    In an up-block's first resnet its input, its norm and its non-linearity live together, 3 x channels in; where
    channels change, at its end the input, its projection, the branch, their sum and the scaled sum. The widest is the
    last block (256 channels at full resolution: 1536 of the 1539 MiB at 1024 px). In its upsampler the interpolated
    picture and the convolved one, four times larger, beside the small one. And the latents after post_quant_conv.
    """
    channels = decoder_channels(vae)
    peak = 0
    for level, channels_out in enumerate(channels):
        channels_in = channels[max(level - 1, 0)]
        shrink = 2 ** (len(channels) - 1 - level)
        pixels = (width // shrink) * (height // shrink)
        resnet = max(3 * channels_in, channels_in + 4 * channels_out, 4 * channels_out)
        upsampler = 9 * channels_out if level < len(channels) - 1 else 0
        peak = max(peak, pixels * max(resnet, upsampler))
    return peak + vae.latent_channels * (width // vae.spatial_factor) * (height // vae.spatial_factor)


def _encoder_elements(vae: VaeSpec, width: int, height: int) -> int:
    """Peak elements of encoding one tile, or picture, of ``width x height`` pixels; the picture itself apart.

    The levels of ``_decoder_elements`` from the picture down to the latents. While a level's later resnet ends, the
    level's input is still there. The downsampler pads its input to a copy of it.
    """
    widths = vae.block_out_channels
    peak = 0
    for level, channels_out in enumerate(widths):
        channels_in = widths[max(level - 1, 0)]
        pixels = (width >> level) * (height >> level)
        peak = max(peak, pixels * max(3 * channels_in, channels_in + 4 * channels_out))
    return peak


def reference_activation_bytes(vae: VaeSpec, sizes: Sequence[tuple[int, int]], tile_px: int, dtype_bytes: int) -> int:
    """Peak of encoding pictures of these (width, height), one after another, each moved off the device before the next.

    Tiled, the moments of all finished tiles lie there, at 1/8 of the side: little beside the tile that is encoded.
    """
    peak = 0
    for width, height in sizes:
        picture = vae.in_channels * width * height
        tile_w, tile_h, finished = width, height, 0
        if tile_px and max(width, height) > tile_px:
            tile_w, tile_h = min(width, tile_px), min(height, tile_px)
            down, across = (sum(length for _, length in tile_starts(side, tile_px)) for side in (height, width))
            finished = 2 * vae.latent_channels * down * across
        peak = max(peak, picture + finished + _encoder_elements(vae, tile_w, tile_h))
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


def decode_activation_bytes(vae: VaeSpec, workload: Workload, tile_px: int, dtype_bytes: int) -> int:
    """Peak of decoding all images, one after another.

    All latents are unpacked first: packed, scaled, and unpatchified copies live together. Then they lie there.

    Tiled, every finished tile (3 channels) is kept until the picture is stitched: the peak is the last tile of the
    largest size, with all that came before it, or the stitching, where all tiles, the rows made of them and the picture
    live together.
    """
    width, height = workload.width, workload.height
    latents = workload.num_images * workload.image_tokens * vae.packed_channels
    if not tile_px:
        return max(_decoder_elements(vae, width, height) + latents, 3 * latents) * dtype_bytes
    down, across = (
        [length * vae.spatial_factor for _, length in tile_starts(side, tile_px)] for side in (height, width)
    )
    peak = 0
    for tile_h in set(down):
        row = len(down) - 1 - down[::-1].index(tile_h)
        for tile_w in set(across):
            column = len(across) - 1 - across[::-1].index(tile_w)
            finished = sum(down[:row]) * sum(across) + tile_h * sum(across[:column])
            peak = max(peak, _decoder_elements(vae, tile_w, tile_h) + vae.out_channels * finished)
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
