"""What a stage reads from files, to the byte: from the prepared store, or from a checkpoint in its own dtype.

Memory holds weights in the compute dtype or in a quantized format, each tensor aligned. A checkpoint's file holds them
in its own dtype, without gaps: read as bf16, an fp32 checkpoint is twice as many bytes on the disk as in a slot. Where
it holds them quantized, and they are decoded as they are read, ``FileSizes`` has the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowmem_flux2.planning.formats import DTYPE_BYTES, FORMATS
from lowmem_flux2.planning.models import BlockSpec, Component, ModelSpec
from lowmem_flux2.planning.passages import AS_HELD, FileForm
from lowmem_flux2.planning.plan import Placement, StagePlan

COUNTER_BYTES = 8
"""A batch norm's ``num_batches_tracked``, int64, which is read with its statistics."""


def stored_bytes(model: ModelSpec, component: Component) -> int:
    """Bytes of a weight in the component's files. Of files in several dtypes, in the one that holds most."""
    return DTYPE_BYTES[model.stored_dtype_of(component)]


def file_form(stage: StagePlan, model: ModelSpec) -> FileForm:
    """Of the stage's blocks; where files hold them quantized, in the mean over all of them."""
    fmt, dtype_bytes = FORMATS[stage.weight_format], DTYPE_BYTES[stage.compute_dtype]
    if fmt.is_quantized:
        return AS_HELD
    sizes = model.file_sizes_of(stage.component)
    if sizes is None:
        return FileForm(stored_bytes(model, stage.component), dtype_bytes)
    blocks = model.transformer.blocks if stage.component == "transformer" else model.text_encoder.blocks
    held = sum(fmt.block_bytes(block, dtype_bytes) for block in blocks)
    return FileForm(sum(sizes.blocks), held, sizes.decoded_weights_per_s * dtype_bytes)


def block_file_bytes(stage: StagePlan, model: ModelSpec, blocks: Sequence[BlockSpec]) -> tuple[int, ...]:
    """Of each block's file in the store, or of its tensors in the checkpoint. Of a quantized file's layers those that
    only writing uses count as its last one that encoding does."""
    fmt, dtype_bytes = FORMATS[stage.weight_format], DTYPE_BYTES[stage.compute_dtype]
    files = model.file_sizes_of(stage.component)
    if files is not None and not fmt.is_quantized:
        return (*files.blocks, *files.blocks[-1:] * (len(blocks) - len(files.blocks)))[: len(blocks)]
    held = stored_bytes(model, stage.component)
    kinds = {id(block): block for block in blocks}  # most blocks are one and the same object
    sizes = {
        kind: fmt.block_bytes(block, dtype_bytes) if fmt.is_quantized else held * block.total_weights
        for kind, block in kinds.items()
    }
    return tuple(sizes[id(block)] for block in blocks)


def other_file_bytes(model: ModelSpec, component: Component, weights: int) -> int:
    """Of so many weights beside the blocks; where the files are quantized, as all of those are in the mean."""
    sizes = model.file_sizes_of(component)
    if sizes is None:
        return stored_bytes(model, component) * weights
    return -(-weights * sizes.other_bytes // sizes.other_weights)


def component_file_bytes(model: ModelSpec, component: Component, blocks: Sequence[BlockSpec]) -> int:
    """Of so many blocks of a component in the checkpoint."""
    files = model.file_sizes_of(component)
    if files is None:
        return stored_bytes(model, component) * sum(block.total_weights for block in blocks)
    return sum(files.blocks) * len(blocks) // len(files.blocks)


def transformer_file_bytes(model: ModelSpec) -> int:
    """Of all that is not in blocks."""
    return other_file_bytes(model, "transformer", model.transformer.non_block_weights)


def text_file_bytes(model: ModelSpec, tokens: int) -> int:
    """At most: of a row of the embedding for each token (one that comes again is not read again), and of the final norm
    where its result is tapped."""
    dims = model.text_encoder
    return other_file_bytes(model, "text_encoder", dims.hidden_size * (tokens + dims.taps_last_layer))


def writer_file_bytes(model: ModelSpec, tokens: int) -> int:
    """At most, beside the layers, where the text encoder writes: lm_head, the final norm, a row for each token."""
    dims = model.text_encoder
    return other_file_bytes(model, "text_encoder", dims.embedding_weights + (tokens + 1) * dims.hidden_size)


def vae_file_bytes(model: ModelSpec, weights: int) -> int:
    """Of one half of the VAE with so many weights, and of the batch norm's mean, variance and counter."""
    return stored_bytes(model, "vae") * (weights + 2 * model.vae.packed_channels) + COUNTER_BYTES


def disk_bytes(stage: StagePlan, blocks: Sequence[int], others: int, rounds: int) -> int:
    """Of the whole stage: blocks that rest in memory are read once, those on disk in each round."""
    pairs = zip(stage.block_placements, blocks, strict=True)
    return others + sum(size * (rounds if placement is Placement.DISK else 1) for placement, size in pairs)
