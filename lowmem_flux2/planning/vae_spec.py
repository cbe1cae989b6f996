"""The shape of FLUX.2's VAE, and how many weights its halves have. Exact, as in ``models``."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """Shape of an AutoencoderKLFlux2, whose convolutions, norms and attention all have biases.

    Attributes:
        patch_size: latents are folded in patches of this many rows and columns before the transformer.
        decoder_block_out_channels: where the decoder's differ from ``block_out_channels`` (a small decoder).
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 32
    patch_size: tuple[int, int] = (2, 2)
    in_channels: int = 3
    out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] | None = None
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along each side: one halving between consecutive levels."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def packed_channels(self) -> int:
        """Channels of a folded latent, as the transformer sees it."""
        return prod(self.patch_size) * self.latent_channels

    @property
    def largest_encoder_weights(self) -> int:
        """Of one convolution of 3 x 3, the widest to itself: no tensor of the encoder is larger."""
        return 9 * max(self.block_out_channels) ** 2

    @property
    def encoder_weights(self) -> int:
        """Encoder and quant_conv: needed for reference images only."""
        widths, moments = self.block_out_channels, 2 * self.latent_channels
        count = _conv3(self.in_channels, widths[0]) + _mid(widths[-1], self.mid_attention)
        for before, width in zip((widths[0], *widths), widths, strict=False):
            count += _resnet(before, width) + (self.layers_per_block - 1) * _resnet(width, width)
        count += sum(_conv3(width, width) for width in widths[:-1])  # downsamplers
        count += 2 * widths[-1] + _conv3(widths[-1], moments)
        return count + (moments * moments + moments if self.quant_conv else 0)

    @property
    def decoder_weights(self) -> int:
        """post_quant_conv and decoder."""
        widths = tuple(reversed(self.decoder_block_out_channels or self.block_out_channels))
        latent = self.latent_channels
        count = _conv3(latent, widths[0]) + _mid(widths[0], self.mid_attention)
        for before, width in zip((widths[0], *widths), widths, strict=False):
            count += _resnet(before, width) + self.layers_per_block * _resnet(width, width)
        count += sum(_conv3(width, width) for width in widths[:-1])  # upsamplers
        count += 2 * widths[-1] + _conv3(widths[-1], self.out_channels)
        return count + (latent * latent + latent if self.post_quant_conv else 0)

    @property
    def total_weights(self) -> int:
        """Encoder and decoder; without the batch norm's statistics (two values a packed channel and a counter)."""
        return self.encoder_weights + self.decoder_weights


def _conv3(in_channels: int, out_channels: int) -> int:
    return 9 * in_channels * out_channels + out_channels


def _resnet(in_channels: int, out_channels: int) -> int:
    shortcut = in_channels * out_channels + out_channels if in_channels != out_channels else 0
    norms = 2 * in_channels + 2 * out_channels
    return norms + _conv3(in_channels, out_channels) + _conv3(out_channels, out_channels) + shortcut


def _mid(width: int, attention: bool) -> int:
    return 2 * _resnet(width, width) + (2 * width + 4 * (width * width + width) if attention else 0)
