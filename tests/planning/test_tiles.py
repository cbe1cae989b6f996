"""Tiles, against what diffusers' own tiled_decode cuts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_flux2.planning.tiles import OVERLAP, TILE_SIDES_PX, tile_is_sound, tile_starts, tiled_pixels_ratio

SIDES = st.integers(1, 128).map(lambda count: 16 * count)
TILES = st.integers(1, 16).map(lambda count: 64 * count)


def cut_by_diffusers(width: int, height: int, tile_px: int) -> list[tuple[int, int]]:
    """(height, width) in latents of each tile that tiled_decode hands to the decoder, in its order."""
    seen: list[tuple[int, int]] = []

    def decoder(tile: torch.Tensor) -> torch.Tensor:
        seen.append((tile.shape[2], tile.shape[3]))
        return tile.new_zeros(1, 3, 8 * tile.shape[2], 8 * tile.shape[3])

    vae: Any = SimpleNamespace(
        tile_overlap_factor=OVERLAP,
        tile_sample_min_size=tile_px,
        tile_latent_min_size=tile_px // 8,
        config=SimpleNamespace(use_post_quant_conv=False),
        decoder=decoder,
        blend_v=lambda above, tile, extent: tile,
        blend_h=lambda left, tile, extent: tile,
    )
    with torch.device("meta"):
        AutoencoderKLFlux2.tiled_decode(vae, torch.empty(1, 32, height // 8, width // 8), return_dict=False)
    return seen


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, TILES)
def test_tiles_are_cut_as_tiled_decode_cuts_them(width: int, height: int, tile_px: int) -> None:
    ours = [(down, across) for _, down in tile_starts(height, tile_px) for _, across in tile_starts(width, tile_px)]
    assert ours == cut_by_diffusers(width, height, tile_px)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, TILES)
def test_the_ratio_counts_the_pixels_that_are_decoded(width: int, height: int, tile_px: int) -> None:
    decoded = sum(64 * down * across for down, across in cut_by_diffusers(width, height, tile_px))
    if tile_px >= max(width, height):
        decoded = width * height  # diffusers leaves it whole
    assert tiled_pixels_ratio(width, height, tile_px) == pytest.approx(decoded / (width * height))
    assert tiled_pixels_ratio(width, height, 0) == 1


def test_the_overlap_is_the_one_of_the_autoencoder() -> None:
    with torch.device("meta"):
        assert AutoencoderKLFlux2().tile_overlap_factor == OVERLAP


@given(SIDES, SIDES, st.sampled_from(TILE_SIDES_PX))
def test_sound_tiles_leave_no_sliver_and_really_tile(width: int, height: int, tile_px: int) -> None:
    if tile_is_sound(width, height, tile_px):
        assert tile_px < max(width, height)
        for side in (width, height):
            for _, length in tile_starts(side, tile_px):
                assert length >= min(tile_px // 16, side // 8)


def test_the_known_sliver_is_not_sound() -> None:
    assert [length for _, length in tile_starts(200, 128)] == [16, 13, 1]
    assert not tile_is_sound(200, 200, 128)


@pytest.mark.parametrize("side", [768, 1024, 1536, 2048, 4096])
def test_common_sizes_have_a_sound_tile(side: int) -> None:
    assert any(tile_is_sound(side, side, px) for px in TILE_SIDES_PX)
