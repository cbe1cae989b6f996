"""Full-size weights without a checkpoint: every tensor is made from a small seeded piece, where it is to rest.

A piece holds some 4 million random weights with one row length, quantized once by the format's own code; a tensor is
that piece repeated from a row that its name decides. So a block's bytes are the same at every reading, two blocks
differ, and values have a checkpoint's scale. Nothing large is random: filling an arena on the host runs at the speed
of a copy, and a resident block is made on the device, of a piece that is there for one tensor's time (8 MiB at most).
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from gpu.meter import Meters
from lowmem_flux2.planning.models import Component, ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import BlockSource, Layout, TensorPlace, layout_of
from lowmem_flux2.runtime.quantize import NF4_BLOCK, NF4_NESTED_BLOCK, STORED
from lowmem_flux2.runtime.stored_linear import StoredLinear
from lowmem_flux2.runtime.streaming import BlockStreamer

GAIN = 0.5
"""Deviation of a weight times the root of its fan-in: residual streams grow slowly, latents stay finite."""
PIECE_WEIGHTS = 1 << 22
LEAST_STARTS = 16
"""A piece has at least so many rows to start from."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of weights in one stored form: storage tensors by name; those that hold no rows are constants."""

    rows: int
    step_rows: int
    tensors: dict[str, torch.Tensor]
    constants: frozenset[str]

    def fill(self, leaf: str, key: str, destination: torch.Tensor) -> None:
        """Repeat one storage tensor over ``destination`` (contiguous), from the row that ``key`` decides."""
        source = self.tensors[leaf].to(destination.device)
        if leaf in self.constants:
            destination.copy_(source.view(destination.shape))
            return
        start = self.start(key) * len(source) // self.rows
        target = destination.view(torch.uint8).view(destination.shape[0], -1)
        pieces = source.view(torch.uint8).view(len(source), -1)
        while len(target):
            part = pieces[start : start + len(target)]
            target[: len(part)].copy_(part)
            target, start = target[len(part) :], 0

    def start(self, key: str) -> int:
        """A row at which all storage tensors have a whole value."""
        return zlib.crc32(key.encode()) % (self.rows // self.step_rows) * self.step_rows


class Pieces:
    """Pieces by stored form and row length, made when first asked for. Thread-safe."""

    def __init__(self, seed: int = 0, piece_weights: int = PIECE_WEIGHTS) -> None:
        self._seed, self._weights = seed, piece_weights
        self._made: dict[tuple[str, int, torch.dtype], Piece] = {}
        self._lock = threading.Lock()

    def get(self, form: str, columns: int, dtype: torch.dtype) -> Piece:
        """``form`` is ``plain`` or the name of a quantized format; scales and plain values are in ``dtype``."""
        with self._lock:
            key = (form, columns, dtype)
            if key not in self._made:
                self._made[key] = self._make(*key)
            return self._made[key]

    def _make(self, form: str, columns: int, dtype: torch.dtype) -> Piece:
        nested = NF4_BLOCK * NF4_NESTED_BLOCK  # the coarsest value that any format shares between weights
        step = nested // math.gcd(columns, nested)
        rows = step * max(LEAST_STARTS, self._weights // (step * columns))
        generator = torch.Generator().manual_seed(self._seed + columns)
        weight = torch.randn(rows, columns, generator=generator).mul_(GAIN / math.sqrt(columns)).to(dtype)
        if form == "plain":
            return Piece(rows, step, {"weight": weight}, frozenset())
        kind = STORED[form]
        one, two = (kind.storage(count, columns, dtype) for count in (rows, 2 * rows))
        constants = frozenset(name for name in one if one[name][0] == two[name][0])
        return Piece(rows, step, kind.quantize(weight, dtype), constants)

    @property
    def total_bytes(self) -> int:
        """RAM that the pieces hold, which a run with a checkpoint would not need."""
        with self._lock:
            return sum(tensor.nbytes for piece in self._made.values() for tensor in piece.tensors.values())

    def fill_plain(self, name: str, destination: torch.Tensor) -> None:
        """An unquantized tensor: matrices and convolutions random, scales and variances 1, biases and means 0."""
        if destination.ndim < 2:
            destination.fill_(0 if name.endswith(("bias", "running_mean")) else 1)
            return
        columns = destination.numel() // destination.shape[0]
        self.get("plain", columns, destination.dtype).fill("weight", name, destination)


@dataclass(frozen=True, slots=True)
class GeneratedTensors:
    """A component's unquantized tensors."""

    pieces: Pieces
    columns: int
    """Row length of what ``read_rows`` is asked for: the token embedding."""
    folder: Path = Path("generated weights")

    def names(self) -> Iterable[str]:
        """The one name that tells where a text encoder's layers are."""
        return ("model.layers.0.input_layernorm.weight",)

    def read_into(self, name: str, destination: torch.Tensor, direct: bool = False) -> None:
        self.pieces.fill_plain(name, destination)

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        piece = self.pieces.get("plain", self.columns, dtype)
        return piece.tensors["weight"][(rows + piece.start(name)) % piece.rows]

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class GeneratedBlock:
    """A block in its stored form. ``forms`` are the quantized formats of ``layout.places``, None for plain tensors."""

    layout: Layout
    forms: tuple[tuple[str, int] | None, ...]
    dtype: torch.dtype
    pieces: Pieces

    @classmethod
    def of(cls, module: nn.Module, prefix: str, dtype: torch.dtype, pieces: Pieces) -> GeneratedBlock:
        """The block of a converted module on the meta device."""
        layout = layout_of(module, prefix, dtype)
        return cls(layout, tuple(_form(module, place) for place in layout.places), dtype, pieces)

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        for place, form in zip(self.layout.places, self.forms, strict=True):
            if form is None:
                self.pieces.fill_plain(place.stored_name, place.view(span))
            else:
                owner, _, leaf = place.stored_name.rpartition(".")
                self.pieces.get(*form, self.dtype).fill(leaf, owner, place.view(span))


def _form(module: nn.Module, place: TensorPlace) -> tuple[str, int] | None:
    owner_name, _, leaf = place.name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if isinstance(owner, StoredLinear) and leaf in owner._buffers:
        return owner.format_name, owner.in_features
    return None


def block_sources(stage: StagePlan, blocks: Blocks, pieces: Pieces) -> list[BlockSource]:
    """Convert the blocks to the stage's weight format and give each a source."""
    dtype = DTYPES[stage.compute_dtype]
    blocks.converted(stage.weight_format, dtype)
    pairs = zip(blocks.modules, blocks.prefixes, strict=True)
    return [GeneratedBlock.of(module, prefix, dtype, pieces) for module, prefix in pairs]


class GeneratedStreamer(BlockStreamer):
    """Makes resident blocks on the device, where they would come through the host's memory."""

    def _load_through_host(self, chosen: Sequence[int]) -> None:
        for index in chosen:
            self._sources[index].read_into(self._spans[index])
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # pieces are no part of what is measured


@dataclass(frozen=True, slots=True)
class GeneratedWeights:
    """A model's weights, as ``runtime.weights.Weights``.

    Args:
        meters: measure each stage's transfers.
        make_sources: where blocks are read from, if not straight from the pieces.
        on_blocks: told of a stage's blocks before they are used, to compile them for instance.
    """

    model: ModelSpec
    pieces: Pieces
    meters: Meters
    make_sources: Callable[[StagePlan, Blocks, Pieces], list[BlockSource]] = block_sources
    on_blocks: Callable[[StagePlan, Blocks], None] = lambda stage, blocks: None

    def open(self, component: Component) -> GeneratedTensors:
        return GeneratedTensors(self.pieces, self.model.text_encoder.hidden_size)

    def streamer(
        self,
        stage: StagePlan,
        blocks: Blocks,
        tensors: Tensors,
        device: torch.device,
        rounds: int,
        warn: Callable[[str], None],
    ) -> BlockStreamer:
        sources = self.make_sources(stage, blocks, self.pieces)
        self.on_blocks(stage, blocks)
        is_made = all(isinstance(source, GeneratedBlock) for source in sources)  # not read from a disk
        streamer = (GeneratedStreamer if is_made else BlockStreamer)(
            blocks=blocks.modules,
            sources=sources,
            placements=stage.block_placements,
            device=device,
            slots=stage.slots,
            rounds=rounds,
            warn=warn,
            transport=self.meters.transport(stage.stage, device),
        )
        self.meters.restart(stage.stage)
        return streamer
