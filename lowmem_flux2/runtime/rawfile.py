"""One file, read at any offset from any thread: large pieces past the page cache, small ones through it.

Why past it (O_DIRECT): a cold buffered read makes a page of cache for every page that it hands over, and copies. On a
2-core virtual machine that was 0.3 to 0.4 GB/s, 59 % of all samples in the kernel's copy out of fresh cache pages,
where the same file came at 1.2 to 1.6 GB/s directly into memory that had been touched before, and at 1.5 to 2.3 GB/s
with two readers (2026-11-24). And blocks that rest on disk are read at each step: cached, they would push everything
else out.

What the page cache holds already (a checkpoint just downloaded, a store just made) is taken from there instead.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.formats import SECTOR_BYTES

PIECE_BYTES = 8 << 20
"""Read at a time, and what a checksum of the store covers."""
BOUNCE_BYTES = 2 << 20
"""Read at a time where file and memory are not aligned alike and the bytes are copied on: stays in a core's cache."""
LEAST_DIRECT_BYTES = 1 << 20
"""Smaller reads (norm scales, rows of an embedding) go through the page cache unless asked otherwise."""
READERS = 2
_SEEK_LOCK = threading.Lock()

OnPiece = Callable[[int, memoryview], None]


class RawFile:
    """A file that is only read. Direct reads fall back to the page cache where the system refuses them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bounces: list[torch.Tensor] = []
        self._direct: int | None = None
        flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
        try:
            self._buffered = os.open(path, flags)
        except OSError as error:
            raise CheckpointBroken(f"{path} cannot be opened: {error}") from error
        if hasattr(os, "O_DIRECT") and hasattr(os, "preadv"):
            try:
                self._direct = os.open(path, flags | os.O_DIRECT)
            except OSError:  # tmpfs and some network file systems have no direct reads
                self._direct = None

    @property
    def is_direct(self) -> bool:
        """Whether the file system lets us past the page cache."""
        return self._direct is not None

    def close(self) -> None:
        os.close(self._buffered)
        if self._direct is not None:
            os.close(self._direct)
        self._bounces.clear()

    def read_into(
        self,
        destination: torch.Tensor,
        offset: int,
        direct: bool = False,
        on_piece: OnPiece = lambda start, piece: None,
    ) -> None:
        """Fill a contiguous 1-D host tensor from the file at ``offset``.

        Args:
            direct: never through the page cache, not even for what it holds.
            on_piece: told of each piece that has been read: where it starts in the destination, and its bytes;
                ``PIECE_BYTES`` long but for the last, in no certain order, from this thread and another.

        Raises:
            CheckpointBroken: the file cannot be read, or ends early.
        """
        target = destination.view(torch.uint8)
        starts = iter(range(0, len(target), PIECE_BYTES))

        def work() -> None:
            try:
                for start in starts:  # shared: each reader takes the next piece
                    piece = target[start : start + PIECE_BYTES]
                    self._fill(piece, offset + start, direct)
                    on_piece(start, _bytes(piece))
            except BaseException:
                deque(starts, maxlen=0)  # the others stop too
                raise

        if len(target) <= READERS * PIECE_BYTES:
            work()
            return
        with ThreadPoolExecutor(READERS - 1, "reader") as others:
            helping = [others.submit(work) for _ in range(READERS - 1)]
            work()
            for each in helping:
                each.result()

    def _fill(self, target: torch.Tensor, offset: int, direct: bool) -> None:
        is_large = direct or len(target) >= LEAST_DIRECT_BYTES
        try:
            done = 0 if direct or not is_large else self._cached(target, offset)
            while done < len(target):
                read = self._read_direct if is_large and self._direct is not None else self._read
                count = read(target[done:], offset + done)
                if count <= 0:
                    raise CheckpointBroken(f"{self.path} ended early: it was changed or cut while it was read")
                done += count
        except OSError as error:
            raise CheckpointBroken(f"{self.path} cannot be read: {error}") from error

    def _cached(self, target: torch.Tensor, offset: int) -> int:
        """How many bytes the page cache had."""
        if self._direct is None or not hasattr(os, "RWF_NOWAIT"):
            return 0
        try:
            return os.preadv(self._buffered, [_bytes(target)], offset, os.RWF_NOWAIT)
        except OSError:  # nothing of it is cached, or this file system cannot say
            return 0

    def _read(self, target: torch.Tensor, offset: int) -> int:
        """How many bytes came. Without ``preadv`` (Windows), one reader at a time."""
        view = _bytes(target)
        if hasattr(os, "preadv"):
            return os.preadv(self._buffered, [view], offset)
        with _SEEK_LOCK:
            os.lseek(self._buffered, offset, os.SEEK_SET)
            read = os.read(self._buffered, min(len(view), PIECE_BYTES))
        view[: len(read)] = read
        return len(read)

    def _read_direct(self, target: torch.Tensor, offset: int) -> int:
        """How many bytes came: whole sectors where they belong, or through a buffer where alignments differ."""
        assert self._direct is not None
        whole = len(target) // SECTOR_BYTES * SECTOR_BYTES
        if whole and offset % SECTOR_BYTES == target.data_ptr() % SECTOR_BYTES == 0:
            return os.preadv(self._direct, [_bytes(target[:whole])], offset)
        skip = offset % SECTOR_BYTES
        wanted = min(BOUNCE_BYTES, -(-(skip + len(target)) // SECTOR_BYTES) * SECTOR_BYTES)
        bounce = self._bounces.pop() if self._bounces else _bounce()
        try:
            count = min(os.preadv(self._direct, [_bytes(bounce[:wanted])], offset - skip) - skip, len(target))
            if count > 0:
                target[:count].copy_(bounce[skip : skip + count])  # lets other threads run meanwhile
            return count
        finally:
            self._bounces.append(bounce)


def _bounce() -> torch.Tensor:
    """A buffer that starts at a page. Never an inference tensor: the other reader could not write to it."""
    with torch.inference_mode(False):
        return torch.frombuffer(mmap.mmap(-1, BOUNCE_BYTES), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().data)
