"""The executor's stages as the simulator runs them: with what differs, which stands for all that does not.

Each leaves tensors of the size of what is not run, at the same moments, so that peaks are those of the whole stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from lowmem_flux2.planning.chunks import chunk_bounds
from lowmem_flux2.planning.tiles import SPATIAL_FACTOR, tile_starts
from lowmem_flux2.planning.workload import Workload
from lowmem_flux2.runtime.alike import REPEATS_RUN
from lowmem_flux2.runtime.decode import Decoder
from lowmem_flux2.runtime.denoise import Denoiser, Progress
from lowmem_flux2.runtime.encode import TextEncoder
from lowmem_flux2.runtime.forward import Forward, Pass
from lowmem_flux2.runtime.live import LiveBytes
from lowmem_flux2.runtime.reference_encoder import ReferenceEncoder

STEPS_RUN = 2
"""The first step starts from noise, the second from what the first left, as all that follow and hold no less."""
TILE_MARGIN = 1.02
"""Of what a smaller tile is taken to need: small tensors are rounded up, and rims of convolutions do not shrink."""


class SimulatedTextEncoder(TextEncoder):
    """The executor's, which may run only its last layers, where most tapped states wait."""

    def stand_for_layers(self) -> None:
        for layer in self._decoder.layers[:-REPEATS_RUN]:
            layer.forward = lambda hidden, **_: torch.empty_like(hidden)


class _Forward(Forward):
    """The executor's, which may make do with some blocks: others leave tensors of the size of what they are given."""

    blocks_run: Container[nn.Module] | None = None
    steps_left = 0

    def predict(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.steps_left -= 1
        return super().predict(*args, **kwargs)

    def _is_run(self, block: nn.Module) -> bool:
        return self.blocks_run is None or (not self.steps_left and block in self.blocks_run)

    def _double(self, block: nn.Module, one: Pass, *rest: Any) -> None:
        if self._is_run(block):
            super()._double(block, one, *rest)
        else:
            one.encoder_hidden, one.hidden = torch.empty_like(one.encoder_hidden), torch.empty_like(one.hidden)

    def _single(self, block: nn.Module, one: Pass, *rest: Any) -> None:
        if self._is_run(block):
            super()._single(block, one, *rest)
        else:
            one.hidden = torch.empty_like(one.hidden)


class SimulatedDenoiser(Denoiser):
    """The executor's, with two steps for all of them, and of some batches only."""

    forward_type = _Forward
    _forward: _Forward
    run_batches: Container[int] = ()
    images_a_prompt = 1
    negative: torch.Tensor | None = None

    def _are_equal(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether the rows are of the same prompts, or all of negative ones; fake tensors have no values."""
        return one.shape == other.shape and self._prompts(one) == self._prompts(other)

    def _prompts(self, embeds: torch.Tensor) -> list[int]:
        if self.negative is not None and embeds.untyped_storage()._cdata == self.negative.untyped_storage()._cdata:
            return []
        first = embeds.storage_offset() // embeds[0].numel()
        return [row // self.images_a_prompt for row in range(first, first + len(embeds))]

    def stand_for_blocks(self) -> None:
        """In the last step alone, run one block of each kind: the second, which no longer meets what came before."""
        net = self._transformer
        kinds = (net.transformer_blocks, net.single_transformer_blocks)
        self._forward.blocks_run = {kind[min(1, len(kind) - 1)] for kind in kinds if len(kind)}

    def stand_for_chunks(self, chunk_tokens: int) -> None:
        """Only the first and the last chunk, which is the longest: what is made of a chunk lies in tensors of all."""

        def chunks(tokens: int) -> list[tuple[int, int]]:
            bounds = chunk_bounds(tokens, chunk_tokens)
            return [*bounds[:-1][:1], bounds[-1]]

        self._forward.chunks = chunks

    def _run(
        self,
        noise: torch.Tensor,
        references: Any,
        progress: Progress,
        timesteps: Any,
        sigmas: Any,
        steps: Any,
        *rest: Any,
    ) -> Any:
        if len(progress.finished) not in self.run_batches:
            return torch.empty(len(noise), noise[0, 0].numel(), noise.shape[1], dtype=noise.dtype)
        self._forward.steps_left = len(steps[:STEPS_RUN])
        return super()._run(noise, references, progress, timesteps, sigmas, steps[:STEPS_RUN], *rest)


class SimulatedReferenceEncoder(ReferenceEncoder):
    """The executor's, which may run only those tiles that may be its peak."""

    def stand_for_tiles(self, size: tuple[int, int], tile_px: int, live: LiveBytes) -> None:
        """Of the next picture, (width, height)."""
        self._vae.encoder.forward = type(self._vae.encoder).forward.__get__(self._vae.encoder)
        _stand_for_tiles(self._vae, self._vae.encoder, size, tile_px, live, given=SPATIAL_FACTOR, made=1)


class SimulatedDecoder(Decoder):
    """The executor's, which may run only those tiles that may be its peak."""

    def stand_for_tiles(self, work: Workload, tile_px: int, live: LiveBytes) -> None:
        size = (work.width, work.height)
        _stand_for_tiles(self._vae, self._vae.decoder, size, tile_px, live, given=1, made=SPATIAL_FACTOR)


def _stand_for_tiles(
    vae: Any, half: Any, size: tuple[int, int], tile_px: int, live: LiveBytes, *, given: int, made: int
) -> None:
    """Let one half of the VAE run the last tile of a size, of pictures of (width, height), if it may be the peak.

    The last one meets the most finished tiles. Whole tiles come first; a smaller one takes memory as its area is, and
    is run if that and what is there may be more than the peak so far. Not blending either: it writes into tiles that
    are there, a row at a time.

    Args:
        given, made: what the half is given and makes, elements a latent's side.
    """
    vae.blend_v = vae.blend_h = lambda above, tile, extent: tile
    across, down = (tile_starts(side, tile_px) for side in size)
    totals = Counter((given * height, given * width) for _, height in down for _, width in across)
    seen: Counter[tuple[int, int]] = Counter()
    most: list[float] = []  # bytes an element given, of the first tile that was run
    run = half.forward

    def forward(tile: torch.Tensor) -> torch.Tensor:
        height, width = tile.shape[-2:]
        device = tile.device.type
        seen[height, width] += 1
        before, area = live.now_bytes[device], height * width
        is_last = seen[height, width] % totals[height, width] == 0
        if not is_last or (most and before + TILE_MARGIN * most[0] * area < live.peak_bytes[device]):
            sides = (height // given * made, width // given * made)
            return tile.new_empty(len(tile), half.conv_out.out_channels, *sides)
        result: torch.Tensor = run(tile)
        most.append((live.peak_bytes[device] - before) / area)
        return result

    half.forward = forward
