"""Source checkpoints: each tensor read from its safetensors file straight to where it is used, never through a copy of
the whole component.

``pread`` instead of mmap: the pages do not count as ours, a read releases the GIL, and the destination's alignment is
ours to choose (safetensors data starts at 24 mod 64 bytes, where Linear kernels round differently).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.headers import SafetensorsHeader, TensorInfo, component_headers

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}
CONVERT_BYTES = 16 << 20
"""Values are converted to another dtype in pieces of this size, so that a large tensor needs no second copy."""


class TensorFile:
    """Random access to the tensors of one component's folder. Thread-safe: every read carries its own offset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[SafetensorsHeader, TensorInfo]] = {}
        self._descriptors: dict[Path, int] = {}
        try:
            for header in component_headers(folder):
                for name, info in header.tensors.items():
                    self._places[name] = (header, info)
                self._descriptors[header.path] = os.open(header.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
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
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def names(self) -> Iterable[str]:
        return self._places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def read_into(self, name: str, destination: torch.Tensor) -> None:
        """Fill a contiguous host tensor of the stored shape, converting the dtype where it differs.

        Raises:
            CheckpointBroken: no such tensor, another shape, or the file ends early.
        """
        info = self._info(name)
        if tuple(destination.shape) != info.shape:
            raise CheckpointBroken(
                f"{self.folder}: tensor {name!r} has shape {list(info.shape)}, the config implies "
                f"{list(destination.shape)}"
            )
        self._read_values(name, 0, destination.view(-1))

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Gather rows of a matrix: (n,) int64 -> (n, columns). A token embedding of 1.25 GiB is never loaded whole.

        Raises:
            CheckpointBroken: no such tensor, not a matrix, a row it does not have, or the file ends early.
        """
        info = self._info(name)
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

    def _info(self, name: str) -> TensorInfo:
        if name not in self._places:
            raise CheckpointBroken(f"{self.folder}: the weights lack the tensor {name!r} that the config implies")
        return self._places[name][1]

    def _read_values(self, name: str, first: int, destination: torch.Tensor) -> None:
        header, info = self._places[name]
        stored = _TORCH_DTYPES.get(info.dtype)
        if stored is None:
            raise CheckpointBroken(f"{self.folder}: tensor {name!r} is stored as {info.dtype}, which is not read here")
        offset = header.data_begin + info.begin + first * stored.itemsize
        descriptor = self._descriptors[header.path]
        if stored == destination.dtype:
            read_exactly(descriptor, destination, offset, header.path)
            return
        piece = max(1, CONVERT_BYTES // stored.itemsize)
        for start in range(0, destination.numel(), piece):
            part = destination[start : start + piece]
            staging = torch.empty(part.numel(), dtype=stored)
            read_exactly(descriptor, staging, offset + start * stored.itemsize, header.path)
            part.copy_(staging)


def read_exactly(descriptor: int, destination: torch.Tensor, offset: int, path: Path) -> None:
    """Fill the contiguous 1-D host tensor from the file at ``offset``."""
    if destination.numel() == 0:
        return
    target = memoryview(destination.view(torch.uint8).numpy().data)
    while target.nbytes:
        try:
            count = _read_at(descriptor, target, offset)
        except OSError as error:
            raise CheckpointBroken(f"{path} cannot be read: {error}") from error
        if count == 0:
            raise CheckpointBroken(f"{path} ended early: it was changed or cut while it was read")
        target, offset = target[count:], offset + count


_SEEK_LOCK = threading.Lock()


def _read_at(descriptor: int, target: memoryview, offset: int) -> int:
    """Read into ``target`` from ``offset``; how many bytes came. Without ``preadv`` (Windows), one reader at a time."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    with _SEEK_LOCK:
        os.lseek(descriptor, offset, os.SEEK_SET)
        read = os.read(descriptor, min(len(target), CONVERT_BYTES))
    target[: len(read)] = read
    return len(read)
