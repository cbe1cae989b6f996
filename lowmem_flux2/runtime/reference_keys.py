"""Keys and values of reference tokens, kept over a batch's steps: the forward of FLUX.2 klein KV.

See ``planning.reference_keys`` for what its first step does otherwise. The kept tensors are diffusers' own
``Flux2KVCache``, filled and read by diffusers' own attention processors, or by ``chunking``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVLayerCache,
    Flux2KVParallelSelfAttnProcessor,
)


@dataclass(frozen=True, slots=True)
class Blended:
    """Modulations (B, width) of a row of tokens, of which those from ``start`` to ``stop`` are references."""

    own: torch.Tensor
    references: torch.Tensor
    start: int
    stop: int

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Of the tokens from first to last: (B, 1 or so many, width)."""
        bounds = [min(max(place, first), last) for place in (first, self.start, self.stop, last)]
        counts = [after - before for before, after in pairwise(bounds)]
        parts = zip((self.own, self.references, self.own), counts, strict=True)
        there = [(modulation.unsqueeze(1), count) for modulation, count in parts if count]
        if len(there) == 1:
            return there[0][0]
        return torch.cat([modulation.expand(-1, count, -1) for modulation, count in there], dim=1)


Modulation = torch.Tensor | Blended


def modulation_of(modulation: Modulation, first: int, last: int) -> torch.Tensor:
    """Of the tokens from first to last, in a shape that is spread over them."""
    return modulation.rows(first, last) if isinstance(modulation, Blended) else modulation


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """What one block needs: the references follow ``text`` tokens, and are among those that it is given
    (``is_filling``), or kept."""

    keys: ReferenceKeys
    kept: Flux2KVLayerCache
    text: int
    is_filling: bool

    @property
    def count(self) -> int:
        return self.keys.tokens

    def arguments(self, is_joint: bool) -> dict[str, Any]:
        """As diffusers' processors take them; a single-stream block is not given its text apart."""
        mode = "extract" if self.is_filling else "cached"
        given = {"kv_cache": self.kept, "kv_cache_mode": mode, "num_ref_tokens": self.count}
        return given | ({"num_txt_tokens": self.text} if is_joint else {})


class ReferenceKeys:
    """Keys and values of a batch's references, filled by the first forward that is given them.

    Attributes:
        latents: of the references, (B, tokens, channels).
        rope: tables of text, references and image.
        are_there: whether a forward has filled them.
    """

    def __init__(
        self,
        transformer: Flux2Transformer2DModel,
        latents: torch.Tensor,
        modulations: tuple[torch.Tensor, torch.Tensor],
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """``modulations``: at timestep 0, of double-stream blocks' image and of single-stream blocks."""
        self.latents, self.rope, self.are_there = latents, rope, False
        self._double, self._single = modulations
        self._doubles = len(transformer.transformer_blocks)
        self._kept = Flux2KVCache(self._doubles, len(transformer.single_transformer_blocks))

    @property
    def tokens(self) -> int:
        return self.latents.shape[1]

    def of_image(self, modulation: torch.Tensor) -> Blended:
        """A double-stream block's; references come before the image."""
        return Blended(modulation, self._double, 0, self.tokens)

    def of_all(self, modulation: torch.Tensor, text: int) -> Blended:
        """A single-stream block's, text tokens first."""
        return Blended(modulation, self._single, text, text + self.tokens)

    def layer(self, index: int, text: int) -> KeptLayer:
        """Of the block with this number, double-stream ones first."""
        kept = (*self._kept.double_block_caches, *self._kept.single_block_caches)[index]
        return KeptLayer(self, kept, text, not self.are_there)


def keep_references(transformer: Flux2Transformer2DModel) -> None:
    """Give every block the attention that can keep keys and values, as Flux2KleinKVPipeline does."""
    for block in transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())


def attention_arguments(layer: KeptLayer | None, is_joint: bool) -> Mapping[str, Any]:
    """What a stock block is given besides."""
    return {} if layer is None else {"joint_attention_kwargs": layer.arguments(is_joint)}
