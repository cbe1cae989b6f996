"""The prepared store: a component's blocks quantized once, each a file of its own in the layout the streamer binds.

    CACHE/prepared/transformer-int8-bf16-<fingerprint>/
        block-000.bin ...     one span, every tensor aligned to 256 bytes: loading a block is one read
        block-000.json ...    its checksum, written before the block's file gets its name
        manifest.json         what it was made of; written last, before the folder gets its name

A killed ``prepare`` leaves a ``.partial-`` folder whose finished blocks are taken over by the next one. The fingerprint
covers the source's files, the format and the library that made it, so a changed source is another entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.headers import component_headers, no_tensor
from lowmem_flux2.runtime.cache import MANIFEST
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import BlockSource, Layout, layout_of
from lowmem_flux2.runtime.rawfile import RawFile

SCHEMA = 2
"""Raised whenever the stored bytes of any format change."""
LIBRARIES = {"nf4": "bitsandbytes"}
"""The library whose version decides a format's bytes; the others are torch arithmetic of ours, covered by SCHEMA."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What an entry holds; its name in the cache is made of these."""

    component: str
    weight_format: str
    dtype: str
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.component}-{self.weight_format}-{self.dtype}-{self.fingerprint}"


def entry_of(folder: Path, component: str, weight_format: str, dtype: str) -> Entry:
    """The entry for a component of a diffusers folder. Reads headers and file times, no weights.

    Raises:
        UsageError: the format's library is not installed.
    """
    digest = hashlib.sha256(f"schema {SCHEMA} {weight_format} {dtype}".encode())
    if weight_format in LIBRARIES:
        try:
            digest.update(metadata.version(LIBRARIES[weight_format]).encode())
        except metadata.PackageNotFoundError as error:
            raise UsageError(f"{component} in {weight_format}: {LIBRARIES[weight_format]} is not installed") from error
    digest.update((folder / component / "config.json").read_bytes())
    for header in component_headers(folder / component, no_tensor):
        seen = header.path.stat()
        names = sorted((name, info.dtype, info.shape, info.begin) for name, info in header.tensors.items())
        digest.update(f"{header.path.name} {seen.st_size} {seen.st_mtime_ns} {names}".encode())
    return Entry(component, weight_format, dtype, digest.hexdigest()[:16])


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block's file."""

    layout: Layout
    path: Path

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        with closing(RawFile(self.path, direct)) as file:
            file.read_into(span, 0)


@dataclass(frozen=True, slots=True)
class PreparedStore:
    """One finished entry."""

    folder: Path
    weight_format: str
    dtype: str
    block_bytes: tuple[int, ...]
    checksums: tuple[str, ...]
    layout: str
    source: str

    @classmethod
    def open(cls, folder: Path) -> PreparedStore:
        """Read the manifest and check that every block's file is there and whole in size.

        Raises:
            CheckpointBroken: names what is missing or of another size.
        """
        try:
            raw: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            store = cls(
                folder=folder,
                weight_format=raw["weight_format"],
                dtype=raw["dtype"],
                block_bytes=tuple(raw["block_bytes"]),
                checksums=tuple(raw["checksums"]),
                layout=raw["layout"],
                source=raw["source"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointBroken(f"{folder}: not a prepared store: {error!r}; remove it") from error
        for index, size in enumerate(store.block_bytes):
            path = block_path(folder, index)
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise CheckpointBroken(f"{path} has {found} bytes, {size} were written: remove {folder}")
        return store

    @property
    def total_bytes(self) -> int:
        return sum(self.block_bytes)

    def sources(self, blocks: Blocks) -> list[BlockSource]:
        """Convert the blocks to this store's format, on the meta device, and pair each with its file.

        Raises:
            CheckpointBroken: the layout is not the one that was written.
        """
        dtype = DTYPES[self.dtype]
        layouts = [layout_of(module, "", dtype) for module in blocks.converted(self.weight_format, dtype).modules]
        if layout_digest(layouts) != self.layout:
            raise CheckpointBroken(
                f"{self.folder} was prepared for another model, or by another release of diffusers or transformers: "
                "remove it"
            )
        return [StoredBlock(layout, block_path(self.folder, index)) for index, layout in enumerate(layouts)]

    def verify(self) -> Iterator[str]:
        """Read everything and compare checksums; a line for each block that differs."""
        for index, checksum in enumerate(self.checksums):
            path = block_path(self.folder, index)
            if _file_checksum(path) != checksum:
                yield f"{path}: its bytes are not those that were written"


def find(folder: Path, component: str, weight_format: str, dtype: str, cache: Path) -> PreparedStore | None:
    """The finished entry for a component as its files are now, or None."""
    final = cache / "prepared" / entry_of(folder, component, weight_format, dtype).name
    return PreparedStore.open(final) if final.exists() else None


def layout_digest(layouts: Sequence[Layout]) -> str:
    """Which tensor lies where in each block: a release of diffusers that names or orders them otherwise is seen."""
    places = [(place.name, place.offset, place.shape, str(place.dtype)) for each in layouts for place in each.places]
    return hashlib.sha256(repr((places, [each.total_bytes for each in layouts])).encode()).hexdigest()


def block_path(folder: Path, index: int) -> Path:
    return folder / f"block-{index:03d}.bin"


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
