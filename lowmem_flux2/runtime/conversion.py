"""Blocks on their way from a checkpoint into a stored format, and into the files of the store.

Three things at once: a thread reads the next piece of the source, some quantize this one, and one writes the block
before. At most two blocks' stored spans and two pieces are held, whatever the model's size.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import WHOLE_TEXT_ENCODER
from lowmem_flux2.runtime.blockfile import block_path, write_block
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import (
    Blocks,
    text_decoder_blocks,
    text_decoder_on_meta,
    text_decoder_root,
    transformer_blocks,
    transformer_on_meta,
)
from lowmem_flux2.runtime.layout import Layout, allocate, layout_of
from lowmem_flux2.runtime.stored_linear import StoredLinear, piece_rows

READ_BYTES = 16 << 20
"""Of a Linear's weight, read at a time."""
MOST_WORKERS = 4
"""Threads that quantize; more would wait for each other's Python."""
_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some rows of a Linear's weight in the source."""

    name: str
    first: int
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Conversion:
    """A component's blocks on the meta device, converted to the format, and where their tensors come from and go."""

    blocks: Blocks
    layouts: tuple[Layout, ...]
    files: TensorFile
    dtype: torch.dtype

    @classmethod
    def of(
        cls, folder: Path, model: ModelSpec, component: str, weight_format: str, dtype: torch.dtype, files: TensorFile
    ) -> Conversion:
        """Of what the prepared store holds. Raises CheckpointBroken where its config cannot be read."""
        try:
            blocks = _component_blocks(folder, model, component, files)
        except OSError as error:
            raise CheckpointBroken(f"{folder / component} cannot be read: {error}") from error
        blocks.converted(weight_format, dtype)
        pairs = zip(blocks.modules, blocks.prefixes, strict=True)
        return cls(blocks, tuple(layout_of(module, prefix, dtype) for module, prefix in pairs), files, dtype)

    def missing(self, folder: Path) -> list[int]:
        """Blocks that are still to be made."""
        return [
            index
            for index, layout in enumerate(self.layouts)
            if not (path := block_path(folder, index)).exists() or path.stat().st_size != layout.total_bytes
        ]

    def bytes_missing(self, folder: Path) -> int:
        return sum(self.layouts[index].total_bytes for index in self.missing(folder))

    def run(self, folder: Path, on_block: Callable[[], None], check: Callable[[], None]) -> None:
        """Write the missing blocks to a folder.

        Args:
            on_block: told of each that is there.
            check: called before one is written, from another thread, and at the end; raises what stops it.

        Raises:
            OSError: the folder cannot be written.
            CheckpointBroken: the source cannot be read, or holds NaN or infinity.
        """
        missing = self.missing(folder)
        largest = max((self.layouts[index].total_bytes for index in missing), default=0)
        spans = [allocate(largest, torch.device("cpu")) for _ in range(min(2, len(missing)))]

        def write(index: int, span: torch.Tensor) -> None:
            check()
            write_block(folder, index, span)

        with (
            torch.inference_mode(False),  # the workers are not in the caller's, and could not write to its tensors
            _single_threads() as workers,
            ThreadPoolExecutor(1, "source-reader") as reader,
            ThreadPoolExecutor(1, "block-writer") as writer,
            ThreadPoolExecutor(workers, "quantizer") as quantizers,
        ):
            pieces = _read_ahead(reader, self.files, self._pieces(missing), self.dtype)
            writing: Future[None] | None = None
            for number, index in enumerate(missing):
                span = spans[number % 2][: self.layouts[index].total_bytes]
                span.zero_()  # the padding between tensors is part of the file
                self._fill(index, span, pieces, quantizers)
                if writing is not None:
                    writing.result()
                    on_block()
                writing = writer.submit(write, index, span)
            if writing is not None:
                writing.result()
                on_block()
        check()

    def _linears(self, index: int) -> Iterator[tuple[str, StoredLinear]]:
        for name, module in self.blocks.modules[index].named_modules():
            if isinstance(module, StoredLinear):
                yield name, module

    def _pieces(self, indices: Iterable[int]) -> Iterator[_Piece]:
        """In the order in which ``_fill`` takes them."""
        for index in indices:
            for name, linear in self._linears(index):
                weight, columns = f"{self.blocks.prefixes[index]}{name}.weight", linear.in_features
                self.files.check_shape(weight, (linear.out_features, columns))
                if self._is_there(index, name, linear):
                    continue
                least = piece_rows(columns)
                step = max(1, READ_BYTES // self.dtype.itemsize // columns // least) * least
                for first in range(0, linear.out_features, step):
                    yield _Piece(weight, first, min(step, linear.out_features - first), columns)

    def _fill(
        self, index: int, span: torch.Tensor, pieces: Iterator[tuple[_Piece, torch.Tensor]], workers: ThreadPoolExecutor
    ) -> None:
        """Read and quantize one block into its span."""
        storage: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in self._linears(index)}
        for place in self.layouts[index].places:
            owner, _, leaf = place.name.rpartition(".")
            if owner in storage and leaf != "bias":
                storage[owner][leaf] = place.view(span)
            else:
                self.files.read_into(place.stored_name, place.view(span))
        for name, linear in self._linears(index):
            if self._is_there(index, name, linear):
                self.files.read_nf4(f"{self.blocks.prefixes[index]}{name}.weight", storage[name])
                continue
            kind, left = type(linear), linear.out_features
            working = storage[name] | kind.scratch(linear.out_features, linear.in_features)
            while left:
                piece, weight = next(pieces)
                quantize = partial(self._quantize, kind, working, piece, weight)
                deque(workers.map(quantize, range(0, piece.rows, piece_rows(piece.columns))), maxlen=0)
                left -= piece.rows
            kind.finish(working)

    def _is_there(self, index: int, name: str, linear: StoredLinear) -> bool:
        """Whether the source holds the Linear in this very format: its bytes are taken over, never quantized again."""
        return linear.format_name == "nf4" and self.files.holds_nf4(f"{self.blocks.prefixes[index]}{name}.weight")

    def _quantize(
        self,
        kind: type[StoredLinear],
        working: Mapping[str, torch.Tensor],
        piece: _Piece,
        weight: torch.Tensor,
        start: int,
    ) -> None:
        """Some rows of a piece."""
        part = weight[start : start + piece_rows(piece.columns)]
        if not isfinite(part.sum(dtype=torch.float32)):
            raise CheckpointBroken(f"{self.files.folder}: the weight {piece.name!r} holds NaN or infinity")
        kind.fill_rows(working, piece.first + start, part)


def _read_ahead(
    reader: ThreadPoolExecutor, files: TensorFile, pieces: Iterable[_Piece], dtype: torch.dtype
) -> Iterator[tuple[_Piece, torch.Tensor]]:
    """Each piece in the compute dtype, (rows, columns), the next one being read meanwhile. Valid until the next."""
    buffers = [torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype)]

    def read(number: int, piece: _Piece) -> tuple[_Piece, torch.Tensor]:
        size = piece.rows * piece.columns
        if len(buffers[number % 2]) < size:
            buffers[number % 2] = torch.empty(size, dtype=dtype)
        weight = buffers[number % 2][:size].view(piece.rows, piece.columns)
        files.read_rows_from(piece.name, piece.first, weight)
        return piece, weight

    reading: Future[tuple[_Piece, torch.Tensor]] | None = None
    for number, piece in enumerate(pieces):
        following = reader.submit(read, number, piece)
        if reading is not None:
            yield reading.result()
        reading = following
    if reading is not None:
        yield reading.result()


@contextmanager
def _single_threads() -> Iterator[int]:
    """How many threads to quantize with, torch's own being off meanwhile: its threads wait for each other after each of
    many small steps, which on a busy machine took up to 50 times as long. One component of the process at a time."""
    with _ALONE:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # here, and in threads that are started from now on
        try:
            yield min(before, MOST_WORKERS)
        finally:
            torch.set_num_threads(before)


def _component_blocks(folder: Path, model: ModelSpec, component: str, files: TensorFile) -> Blocks:
    """The streamable blocks of a component, or of the whole text encoder, on the meta device."""
    if component == "transformer":
        return transformer_blocks(transformer_on_meta(folder / component))
    text = model.text_encoder
    layers = text.num_layers if component == WHOLE_TEXT_ENCODER else text.layers_used
    decoder = text_decoder_on_meta(folder / "text_encoder", model, layers)
    return text_decoder_blocks(decoder, text_decoder_root(files))
