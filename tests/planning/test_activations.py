"""How the closed forms move; that they are right is ``test_cost_grid``'s to show."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import DEV, KLEIN_BASE, MODELS, spec, work

from lowmem_flux2.planning import flops
from lowmem_flux2.planning.activations import (
    conditioning_peak_bytes,
    decode_activation_bytes,
    denoise_activation_bytes,
    encode_activation_bytes,
)
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.tiles import TILE_SIDES_PX
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.units import MIB

BF16 = 2
PLAIN = FORMATS["bf16"]
SIDES = st.integers(32, 128).map(lambda count: 16 * count)


def sized(width: int, height: int, images: int = 1) -> Workload:
    return replace(
        work(DEV), width=width, height=height, image_tokens=width * height // 256, num_images=images, num_prompts=images
    )


def test_the_figures_of_dev_at_1024_px() -> None:
    """What the simulator finds, in MiB; library-facts' 1165, of a stock forward, keeps no prediction."""
    model, one = spec(DEV), work(DEV)
    conditioning = 1 * 512 * 6144 * BF16 + one.steps * 16 * 6144 * BF16
    assert (denoise_activation_bytes(model, one, 1, BF16, 0, PLAIN) - conditioning) / MIB == pytest.approx(1141, abs=1)
    assert encode_activation_bytes(model, one, (1,), BF16, PLAIN) / MIB == pytest.approx(111.5, abs=0.1)
    assert decode_activation_bytes(model.vae, one, 0, BF16) / MIB == pytest.approx(1538, abs=0.1)
    assert decode_activation_bytes(model.vae, one, 512, BF16) / MIB == pytest.approx(390.5, abs=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_denoising_grows_with_batch_and_size_and_falls_with_chunks(name: str) -> None:
    def peak(px: int = 1024, batch: int = 1, chunk: int = 0) -> int:
        return denoise_activation_bytes(spec(name), work(name, px), batch, BF16, chunk, PLAIN)

    assert peak(512) < peak(768) < peak(1024) < peak(2048)
    assert peak() < peak(batch=2) < 2 * peak()
    assert peak(chunk=64) <= peak(chunk=512) < peak(chunk=2048) < peak()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [0, 512])
def test_a_quantized_format_adds_its_expanded_weight_where_that_is_the_peak(name: str, chunk: int) -> None:
    """Small sequences peak in a Linear, which the weight is added to; large ones elsewhere, where it is gone.

    In chunks even those of 1024 px peak in a Linear, and only where attention outgrows a chunk is the weight gone.
    """
    model = spec(name)
    largest = max(rows * columns for rows, columns in model.transformer.single_block.linears) * BF16

    def added(px: int) -> int:
        plain, int8 = (
            denoise_activation_bytes(model, work(name, px), 1, BF16, chunk, FORMATS[each]) for each in ("bf16", "int8")
        )
        return int8 - plain

    assert 0.4 * largest < added(128) < 1.3 * largest
    if chunk:
        assert 0 <= added(4096) < 0.4 * largest < added(1024) < 1.3 * largest
    else:
        assert 0 <= added(4096) <= added(1024) <= added(128)
        assert added(4096) <= 0.5 * largest


def test_a_second_guidance_pass_and_references_cost_memory() -> None:
    model, one = spec(KLEIN_BASE), replace(work(KLEIN_BASE), guidance_passes=1)
    more = (replace(one, guidance_passes=2), replace(one, reference_tokens=1024))

    def denoising(workload: Workload) -> int:
        return denoise_activation_bytes(model, workload, 1, BF16, 0, PLAIN)

    assert all(denoising(one) < denoising(each) for each in more)
    encoding = [encode_activation_bytes(model, one, batches, BF16, PLAIN) for batches in ((1,), (1, 1))]
    assert encoding[0] < encoding[1]
    assert conditioning_peak_bytes(model, one, 1, BF16) < conditioning_peak_bytes(model, more[0], 1, BF16)


def test_a_small_decoder_is_counted_by_its_own_channels() -> None:
    vae, one = spec(DEV).vae, work(DEV)
    small = replace(vae, decoder_block_out_channels=(96, 192, 384, 384))
    assert decode_activation_bytes(small, one, 0, BF16) < decode_activation_bytes(vae, one, 0, BF16)
    assert flops.decode_flops(small, 1024, 1024) < flops.decode_flops(vae, 1024, 1024)


def test_what_convolutions_hold_is_counted() -> None:
    """At 1024 px in bf16 with AMX, the peak RSS of the decoder alone was 2461 MiB, some of it in glibc's heaps."""
    vae, one = spec(DEV).vae, work(DEV)
    tensors, given, both = (decode_activation_bytes(vae, one, 0, BF16, copies) / MIB for copies in (0, 1, 2))
    assert (tensors, given, both) == pytest.approx((1538, 1922, 2434), abs=1)
    for tile in TILE_SIDES_PX:
        assert decode_activation_bytes(vae, one, tile, BF16) < decode_activation_bytes(vae, one, tile, BF16, 1)


@given(SIDES, SIDES, st.sampled_from(TILE_SIDES_PX), st.integers(1, 50))
def test_tiles_never_need_more_than_their_picture_and_stitching(
    width: int, height: int, tile: int, images: int
) -> None:
    vae, run = spec(DEV).vae, sized(width, height, images)
    tiled, whole = (decode_activation_bytes(vae, run, px, BF16) for px in (tile, 0))
    picture = vae.out_channels * width * height * BF16
    assert tiled <= whole + 6 * picture
    assert tiled >= run.num_images * run.image_tokens * vae.packed_channels * BF16 + 3 * picture


@given(SIDES, SIDES, st.integers(1, 100))
def test_waiting_latents_of_many_images_are_counted(width: int, height: int, images: int) -> None:
    vae = spec(DEV).vae
    one, many = (decode_activation_bytes(vae, sized(width, height, count), 0, BF16) for count in (1, images))
    latents = width * height // 256 * vae.packed_channels * BF16
    assert many - one == (images - 1) * latents
