"""What quantizing a component into the prepared store takes, once, before the first run with its format."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lowmem_flux2.planning.file_bytes import component_file_bytes
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import OUT_LAYERS, ModelSpec
from lowmem_flux2.planning.plan import WHOLE_TEXT_ENCODER, Preparation, StagePlan
from lowmem_flux2.planning.stage_work import block_sizes

WEIGHTS_PER_S = {"int8": 456e6, "fp8": 483e6, "nf4": 250e6, "int4": 297e6, "int6": 240e6, "nf4-mixed": 30e6}
"""Weights that one thread quantizes in a second: processor time of ``runtime.quantize`` on 6144 x 6144 in bf16, best of
three, torch 2.13 on an AMD EPYC (Zen 5), 2026-11-24; nf4's is of its packing alone, 4 ns a weight; int6's by its
ratio to int4's (0.81 to 0.86) on 2026-11-25, nf4-mixed's, which searches scales, by its ratio to nf4's (0.11 to 0.13)
on 2026-11-26, both on a busy machine. An EPYC without AVX-512 took 155 for nf4, 363 for
int8, 89 for int6 and 131 for int4. Other processors differ."""
SLOWEST_WEIGHTS_PER_S = min(WEIGHTS_PER_S.values())
"""Assumed of a format that nobody has measured."""
CHECKSUM_BYTES_PER_S = 4.2e9
"""CRC-32 of zlib, one thread of an AMD EPYC virtual machine (`runtime.blockfile`)."""

SPARE_BYTES = 64 << 20
"""Left free on the store's disk, for the manifest and for others."""

Prepared = Collection[tuple[str, str, str]]
"""(component, or ``WHOLE_TEXT_ENCODER``, format as stored, compute dtype) of what the store holds for a model."""


def prepared_as(stage: StagePlan, model: ModelSpec) -> str:
    """What the store is to hold for a stage: of a text encoder with other layers tapped than its pipeline's, the whole,
    as the cut one is that of the pipeline."""
    text = model.text_encoder
    if stage.component == "text_encoder" and text.out_layers != OUT_LAYERS[text.architecture]:
        return WHOLE_TEXT_ENCODER
    return stage.prepared_as


def preparations(
    stages: Iterable[StagePlan], model: ModelSpec, hardware: Hardware, prepared: Prepared
) -> tuple[Preparation, ...]:
    """What must be made for these stages, beside what is ``prepared``.

    Each block is read (and decoded, where its file has it quantized), quantized, checked and written, one after the
    other. The disk is taken to write as fast as it reads: an assumption, profiles have no rate of writing.
    """
    missing = []
    there = set(prepared)
    for stage in stages:
        fmt = FORMATS[stage.weight_format]
        asked = (fmt.stored_as, stage.compute_dtype)
        name = prepared_as(stage, model)
        names = {name} | ({WHOLE_TEXT_ENCODER} if stage.component == "text_encoder" else set())
        if not fmt.is_prepared or any((each, *asked) in there for each in names):
            continue
        there.add((name, *asked))  # of two stages one is enough: the whole encoder comes first
        blocks = model.transformer.blocks if stage.component == "transformer" else model.text_encoder.blocks
        sizes = block_sizes(stage, model)
        if name == WHOLE_TEXT_ENCODER:
            layers = model.text_encoder.num_layers
            blocks, sizes = (model.text_encoder.layer,) * layers, sizes[:1] * layers
        weights = sum(block.total_weights for block in blocks)
        read, written = component_file_bytes(model, stage.component, blocks), sum(sizes)
        seconds = (read + written) / hardware.disk_read_bytes_per_s + written / CHECKSUM_BYTES_PER_S
        if (files := model.file_sizes_of(stage.component)) is not None:
            seconds += weights / files.decoded_weights_per_s
        seconds += weights / WEIGHTS_PER_S.get(fmt.stored_as, SLOWEST_WEIGHTS_PER_S)
        missing.append(Preparation(name, fmt.stored_as, read, written, seconds))
    return tuple(missing)
