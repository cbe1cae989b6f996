"""Source checkpoints: each tensor read from its safetensors or GGUF file straight to where it is used, never through a
copy of the whole component.

``pread`` instead of mmap: the pages do not count as ours, a read releases the GIL, and the destination's alignment is
ours to choose (safetensors data starts at 24 mod 64 bytes, where Linear kernels round differently).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.formats import NF4_BLOCK, NF4_NESTED_BLOCK
from lowmem_flux2.planning.headers import FileHeader
from lowmem_flux2.planning.stored import Place, StoredTensor, check_decodable, model_view, plain_view
from lowmem_flux2.planning.weight_files import component_headers, no_tensor
from lowmem_flux2.runtime.decoding import TORCH_DTYPES, decoded_rows, rows_together
from lowmem_flux2.runtime.rawfile import RawFile

CONVERT_BYTES = 16 << 20
"""Values are converted to another dtype in pieces of this size, so that a large tensor needs no second copy."""
DECODE_BYTES = 4 << 20
"""Quantized values are decoded so much fp32 at a time: decoding holds a few times that."""


class Tensors(Protocol):
    """The tensors of one component by name, from any thread: ``TensorFile``, or a stand-in that makes them up."""

    @property
    def folder(self) -> Path:
        """What messages call the place they come from."""
        ...

    def names(self) -> Iterable[str]: ...

    def read_into(self, name: str, destination: torch.Tensor, direct: bool = False) -> None: ...

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def close(self) -> None: ...


class TensorFile:
    """Random access to the tensors of one component's folder. Thread-safe: every read carries its own offset.

    Args:
        headers: of other files than a component's, whose tensors go by their own names.
    """

    def __init__(self, folder: Path, headers: Sequence[FileHeader] | None = None) -> None:
        self.folder = folder
        self._files: dict[Path, RawFile] = {}
        try:
            if headers is None:
                headers = component_headers(folder, no_tensor)
                self._tensors = model_view(headers)
            else:
                self._tensors = plain_view(headers)
            for tensor in self._tensors.values():
                check_decodable(tensor)
            for header in headers:
                self._files[header.path] = RawFile(header.path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises CheckpointBroken where there is no such tensor, or of another shape."""
        stored = self._tensor(name).shape
        if stored != shape:
            raise CheckpointBroken(
                f"{self.folder}: tensor {name!r} has shape {list(stored)}, the config implies {list(shape)}"
            )

    def read_into(self, name: str, destination: torch.Tensor, direct: bool = False) -> None:
        """Fill a contiguous host tensor of the stored shape, converting the dtype where it differs.

        ``direct`` reads past the page cache, whatever it holds.

        Raises:
            CheckpointBroken: no such tensor, another shape, or the file ends early.
        """
        self.check_shape(name, tuple(destination.shape))
        self._read_values(name, 0, destination.view(-1), direct)

    def packed_kind(self, name: str) -> str | None:
        """The GGUF type of a tensor in quantized blocks."""
        tensor = self._tensor(name)
        return tensor.place.info.dtype if tensor.encoding == "gguf" else None

    def read_packed(self, name: str, destination: torch.Tensor, direct: bool = False) -> None:
        """Fill (rows, bytes) uint8 with a tensor's GGUF blocks as they are."""
        tensor = self._tensor(name)
        row_bytes, begin = destination.shape[1], 0
        for row, rows in tensor.rows:
            part = destination[begin : begin + rows]
            spread = (
                part if tensor.stride == 1 else torch.empty(_spread(rows, tensor.stride), row_bytes, dtype=torch.uint8)
            )
            self._opened(tensor.place).read_into(spread.view(-1), tensor.place.offset + row * row_bytes, direct)
            if spread is not part:
                part.copy_(spread[:: tensor.stride])
            begin += rows

    def holds_nf4(self, name: str) -> bool:
        """Whether a tensor is stored as ``Nf4Linear`` holds it: bitsandbytes' nf4 with nested scales, blocks of 64."""
        tensor = self._tensor(name)
        kinds = {leaf: aid.info.dtype for leaf, aid in tensor.aids.items()}
        return (
            tensor.encoding == "bnb4"
            and tensor.place.name.endswith(name)
            and tensor.state["quant_type"] == "nf4"
            and (tensor.state["blocksize"], tensor.state.get("nested_blocksize")) == (NF4_BLOCK, NF4_NESTED_BLOCK)
            and kinds == {"absmax": "U8", "quant_map": "F32", "nested_absmax": "F32", "nested_quant_map": "F32"}
        )

    def read_nf4(self, name: str, storage: Mapping[str, torch.Tensor]) -> None:
        """Fill ``Nf4Linear``'s tensors, but for a bias, with a tensor's as they are stored (``holds_nf4``)."""
        tensor = self._tensor(name)
        places = {
            "weight": tensor.place,
            "absmax": tensor.aids["absmax"],
            "nested_absmax": tensor.aids["nested_absmax"],
            "levels": tensor.aids["quant_map"],
            "nested_levels": tensor.aids["nested_quant_map"],
        }
        for leaf, place in places.items():
            self._opened(place).read_into(storage[leaf].view(-1), place.offset)
        storage["offset"].fill_(tensor.state["nested_offset"])

    def read_rows_from(self, name: str, first: int, destination: torch.Tensor) -> None:
        """Fill (rows, columns) with the rows of a matrix from ``first`` on, converting the dtype where it differs."""
        self._read_values(name, first * destination.shape[1], destination.view(-1))

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gather rows of a matrix: (n,) int64 -> (n, columns). A token embedding of 1.25 GiB is never loaded whole.

        Raises:
            CheckpointBroken: no such tensor, not a matrix, a row it does not have, or the file ends early.
        """
        info = self._tensor(name)
        if len(info.shape) != 2:
            raise CheckpointBroken(f"{self.folder}: tensor {name!r} has shape {list(info.shape)}, not rows and columns")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < info.shape[0]:
            raise CheckpointBroken(
                f"{self.folder}: row {int(rows.max())} of {name!r} was asked for, it has {info.shape[0]}: "
                "tokenizer and text encoder are of different models"
            )
        columns = info.shape[1]
        gathered = torch.empty(len(rows), columns, dtype=dtype)
        for at, row in enumerate(rows.tolist()):
            self._read_values(name, row * columns, gathered[at])
        return gathered

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointBroken(f"{self.folder}: the weights lack the tensor {name!r} that the config implies")
        return self._tensors[name]

    def _opened(self, place: Place) -> RawFile:
        return self._files[place.header.path]

    def _read_values(self, name: str, first: int, destination: torch.Tensor, direct: bool = False) -> None:
        """Values of a tensor from the ``first`` on; whole rows of a quantized one."""
        tensor = self._tensor(name)
        if tensor.encoding == "plain" and tensor.place.info.dtype not in TORCH_DTYPES:
            raise CheckpointBroken(
                f"{self.folder}: tensor {name!r} is stored as {tensor.place.info.dtype}, which is not read here"
            )
        begin, wanted, columns = 0, first + len(destination), tensor.row_values
        for row, rows in tensor.rows:
            end = begin + rows * columns
            low, high = max(first, begin), min(wanted, end)
            if low < high and tensor.stride == 1:
                at = row * columns + low - begin
                self._read_stored(tensor, at, destination[low - first : high - first], direct)
            elif low < high:
                skipped, count = (low - begin) // columns, (high - low) // columns
                spread = torch.empty(_spread(count, tensor.stride), columns, dtype=destination.dtype)
                self._read_stored(tensor, (row + skipped * tensor.stride) * columns, spread.view(-1), direct)
                destination[low - first : high - first].view(count, columns).copy_(spread[:: tensor.stride])
            begin = end

    def _read_stored(self, tensor: StoredTensor, first: int, destination: torch.Tensor, direct: bool) -> None:
        """Values of the stored tensor from its ``first`` on."""
        if tensor.encoding != "plain":
            columns, least = tensor.row_values, rows_together(tensor)
            size = DECODE_BYTES * (8 if tensor.state.get("transposed") else 1)  # of which each column is a read
            step = max(1, size // 4 // columns // least) * least
            rows = len(destination) // columns
            for row in range(0, rows, step):
                count = min(step, rows - row)
                part = decoded_rows(tensor, self._opened, first // columns + row, count, direct)
                destination[row * columns : (row + count) * columns].copy_(part)
            return
        stored, file = TORCH_DTYPES[tensor.place.info.dtype], self._opened(tensor.place)
        offset = tensor.place.offset + first * stored.itemsize
        if stored == destination.dtype:
            file.read_into(destination, offset, direct)
            return
        piece = max(1, CONVERT_BYTES // stored.itemsize)
        for start in range(0, destination.numel(), piece):
            part = destination[start : start + piece]
            staging = torch.empty(part.numel(), dtype=stored)
            file.read_into(staging, offset + start * stored.itemsize, direct)
            part.copy_(staging)


def _spread(count: int, stride: int) -> int:
    """Stored rows from the first to the last of ``count``, of which each ``stride``-th is taken."""
    return (count - 1) * stride + 1
