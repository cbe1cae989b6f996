"""Where a run's weights come from, as the stages ask for it.

``CheckpointWeights`` is what users run. Benchmarks and simulations of full-size models have no checkpoint: they hand
the stages a ``Weights`` that makes tensors up, and everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from lowmem_flux2.planning.formats import FORMATS, GGUF
from lowmem_flux2.planning.headers import FileHeader
from lowmem_flux2.planning.models import Component
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.runtime.checkpoint import TensorFile, Tensors
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import BlockSource
from lowmem_flux2.runtime.packed import packed_sources
from lowmem_flux2.runtime.pinning import Pinning
from lowmem_flux2.runtime.store import PreparedStore
from lowmem_flux2.runtime.streaming import BlockStreamer


class Weights(Protocol):
    """The weights of one model."""

    def open(self, component: Component) -> Tensors:
        """The component's own tensors, unquantized; the caller closes them."""
        ...

    def adapter(self, header: FileHeader) -> Tensors:
        """A LoRA's tensors; the caller closes them."""
        ...

    def streamer(
        self,
        stage: StagePlan,
        blocks: Blocks,
        tensors: Tensors,
        device: torch.device,
        rounds: int,
        warn: Callable[[str], None],
    ) -> BlockStreamer:
        """A streamer over the stage's blocks in its weight format, placed by its plan; the caller closes it.

        Args:
            blocks: on the meta device; their Linears are converted to the format in place.
            tensors: what ``open`` gave, open as long as the streamer is.
        """
        ...


@dataclass(frozen=True, slots=True)
class CheckpointWeights:
    """A diffusers folder, the prepared stores of the plan by ``StagePlan.prepared_as``, and what may be pinned."""

    folder: Path
    stores: Mapping[str, PreparedStore] = field(default_factory=dict)
    pinning: Pinning | None = None

    def open(self, component: Component) -> TensorFile:
        return TensorFile(self.folder / component)

    def adapter(self, header: FileHeader) -> TensorFile:
        return TensorFile(header.path, [header])

    def streamer(
        self,
        stage: StagePlan,
        blocks: Blocks,
        tensors: Tensors,
        device: torch.device,
        rounds: int,
        warn: Callable[[str], None],
    ) -> BlockStreamer:
        return BlockStreamer(
            blocks=blocks.modules,
            sources=self._sources(stage, blocks, tensors),
            placements=stage.block_placements,
            device=device,
            slots=stage.slots,
            rounds=rounds,
            warn=warn,
            pinning=self.pinning,
        )

    def _sources(self, stage: StagePlan, blocks: Blocks, tensors: Tensors) -> list[BlockSource]:
        dtype = DTYPES[stage.compute_dtype]
        if stage.weight_format == GGUF:
            return packed_sources(blocks, tensors, dtype)
        is_stored = FORMATS[stage.weight_format].is_quantized  # of one component another stage's format may be
        store = self.stores.get(stage.prepared_as) if is_stored else None
        return store.sources(blocks, stage.weight_format) if store else blocks.sources(tensors, dtype)
