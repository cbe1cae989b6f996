"""VAE tiles: which sides leave no sliver, in the arithmetic of diffusers' tiled_decode."""

from __future__ import annotations

from collections.abc import Sequence

TILE_SIDES_PX = (1024, 768, 512, 384, 256, 192, 128)
OVERLAP = 0.25
"""AutoencoderKLFlux2.tile_overlap_factor: neighbours share a quarter of a tile, blended."""
SPATIAL_FACTOR = 8


def tile_starts(side_px: int, tile_px: int) -> list[tuple[int, int]]:
    """(start, length) in latents of each tile along one side, as tiled_decode cuts them."""
    latents, tile = side_px // SPATIAL_FACTOR, tile_px // SPATIAL_FACTOR
    step = int(tile * (1 - OVERLAP))
    return [(start, min(tile, latents - start)) for start in range(0, latents, step)]


def tile_is_sound(width: int, height: int, tile_px: int) -> bool:
    """True where tiling applies and no tile is narrower than half of one: slivers decode with visible error."""
    if tile_px >= max(width, height):
        return False
    least = tile_px // SPATIAL_FACTOR // 2
    return all(
        length >= min(least, side // SPATIAL_FACTOR)
        for side in (width, height)
        for _, length in tile_starts(side, tile_px)
    )


def tiles_are_sound(sizes: Sequence[tuple[int, int]], tile_px: int) -> bool:
    """Whether the tiles of every picture (width, height) that is larger than one are sound."""
    return all(tile_px >= max(size) or tile_is_sound(*size, tile_px) for size in sizes)


def tiled_pixels_ratio(width: int, height: int, tile_px: int) -> float:
    """Pixels decoded in tiles over pixels of the picture: overlaps are decoded twice. 1 untiled."""
    if not tile_px or tile_px >= max(width, height):
        return 1.0
    across, down = (sum(length for _, length in tile_starts(side, tile_px)) for side in (width, height))
    return across * down * SPATIAL_FACTOR**2 / (width * height)
