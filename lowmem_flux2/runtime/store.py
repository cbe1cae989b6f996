"""The prepared store: a component's blocks quantized once, each a file of its own in the layout the streamer binds.

    CACHE/prepared/transformer-int8-bf16-<fingerprint>/
        block-000.bin ...     one span of whole sectors, every tensor aligned to 256 bytes: loading a block is one read
        block-000.json ...    its checksums, written before the block's file gets its name
        manifest.json         what it was made of, and all checksums, its own too; written last, before the folder gets
                              its name

A killed ``prepare`` leaves a ``.partial-`` folder whose finished blocks are taken over by the next one. The fingerprint
covers the source's files, the format and the library that made it, so a changed source is another entry.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import WHOLE_TEXT_ENCODER
from lowmem_flux2.planning.support import LIBRARY_OF
from lowmem_flux2.planning.weight_files import component_headers, no_tensor
from lowmem_flux2.runtime.blockfile import StoredBlock, block_path
from lowmem_flux2.runtime.cache import MANIFEST, EntryDamaged, entry_folder
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import BlockSource, Layout, allocate, layout_of

SCHEMA = 3
"""Raised whenever the stored bytes of any format change, or what is kept about them."""
LIBRARIES = {name: library for name, library in LIBRARY_OF.items() if FORMATS[name].is_prepared}
"""The library whose version decides a format's bytes; the others are torch arithmetic of ours, covered by SCHEMA."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Pieces of each source file that go into the fingerprint, first and last included."""


class OtherLayout(EntryDamaged):
    """An entry of another model, or of a release that lays blocks out otherwise: nothing of it serves."""

    def __init__(self, folder: Path, what: str, layout: str) -> None:
        super().__init__(folder, what)
        self._layout = layout

    def set_aside(self) -> None:
        """Remove all of it, unless another process has made it again."""
        with suppress(EntryDamaged):
            if Manifest.read(self.folder).layout != self._layout:
                return
        for path in (*self.folder.glob("block-*"), self.folder / MANIFEST):
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """What an entry holds; its name in the cache is made of these. The weight format is the stored one.

    ``component`` may be ``plan.WHOLE_TEXT_ENCODER``.
    """

    component: str
    weight_format: str
    dtype: str
    fingerprint: str

    @property
    def name(self) -> str:
        return f"{self.component}-{self.weight_format}-{self.dtype}-{self.fingerprint}"


def entry_of(folder: Path, component: str, weight_format: str, dtype: str) -> Entry:
    """The entry for a component of a diffusers folder. Reads headers, file times and a sample of the weights.

    Inode and change time would see more, and too much: copying or hard-linking a model, a container's ``chown -R`` at
    each start, or file systems with inode numbers of the day would have everything prepared again. The sample sees
    other weights under an old modification time. (In the hub's cache the files are links: what they point at counts.)

    Raises:
        UsageError: the format's library is not installed.
        CheckpointBroken, CheckpointMissing: the source cannot be read.
    """
    weight_format, name = FORMATS[weight_format].stored_as, component
    component = files_of(component)
    digest = hashlib.sha256(f"schema {SCHEMA} {weight_format} {dtype}".encode())
    if weight_format in LIBRARIES:
        try:
            digest.update(metadata.version(LIBRARIES[weight_format]).encode())
        except metadata.PackageNotFoundError as error:
            raise UsageError(f"{component} in {weight_format}: {LIBRARIES[weight_format]} is not installed") from error
    for part in _content(folder / component, with_times=True):
        digest.update(part)
    return Entry(name, weight_format, dtype, digest.hexdigest()[:16])


def content_fingerprint(folder: Path, component: str) -> str:
    """Of a component's config, file sizes, headers and a sample of the weights: a copy's is the same.

    Raises:
        CheckpointBroken, CheckpointMissing: the source cannot be read.
    """
    digest = hashlib.sha256()
    for part in _content(folder / component, with_times=False):
        digest.update(part)
    return digest.hexdigest()[:16]


def _content(folder: Path, with_times: bool) -> Iterator[bytes]:
    try:
        yield (folder / "config.json").read_bytes()
        for header in component_headers(folder, no_tensor):
            seen = header.path.stat()
            names = sorted((name, info.dtype, info.shape, info.begin) for name, info in header.tensors.items())
            time = f"{seen.st_mtime_ns} " if with_times else ""
            yield f"{header.path.name} {seen.st_size} {time}{names}".encode()
            yield from _samples(header.path, seen.st_size)
    except OSError as error:
        raise CheckpointBroken(f"{folder} cannot be read: {error}") from error


def files_of(component: str) -> str:
    """The folder with the files of what is prepared."""
    return "text_encoder" if component == WHOLE_TEXT_ENCODER else component


def _samples(path: Path, size_bytes: int) -> Iterator[bytes]:
    """``SAMPLES`` pieces of a file, evenly spread."""
    last = max(0, size_bytes - SAMPLE_BYTES)
    with path.open("rb", buffering=0) as file:
        for index in range(SAMPLES):
            file.seek(last * index // (SAMPLES - 1))
            yield file.read(SAMPLE_BYTES)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an entry was made of. ``checksums``: of each block, one a piece; ``layout``: ``layout_digest``."""

    component: str
    weight_format: str
    dtype: str
    fingerprint: str
    schema: int
    source: str
    block_bytes: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]
    layout: str
    versions: dict[str, str]

    def text(self) -> str:
        """As JSON, with a checksum of itself."""
        raw = asdict(self)
        return json.dumps({**raw, "crc32": _checksum(raw)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a finished entry.

        Raises:
            EntryDamaged: missing, unreadable, or not what was written.
        """
        try:
            raw: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if raw.pop("crc32") != _checksum(raw):
                raise ValueError("it is not what was written")
            blocks, checksums = tuple(raw.pop("block_bytes")), tuple(tuple(each) for each in raw.pop("checksums"))
            return cls(**raw, block_bytes=blocks, checksums=checksums)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EntryDamaged(folder, f"{folder / MANIFEST} is damaged ({error})") from error


def _checksum(raw: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(raw, sort_keys=True).encode())


@dataclass(frozen=True, slots=True)
class PreparedStore:
    """One finished entry."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> PreparedStore:
        """Read the manifest and check that every block's file is there and whole in size.

        Raises:
            EntryDamaged: names what is missing or of another size.
        """
        manifest = Manifest.read(folder)
        for index, size in enumerate(manifest.block_bytes):
            path = block_path(folder, index)
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise EntryDamaged(folder, f"{path} has {found or 'no'} bytes, {size} were written")
        return cls(folder, manifest)

    @property
    def total_bytes(self) -> int:
        return sum(self.manifest.block_bytes)

    def sources(self, blocks: Blocks, weight_format: str = "") -> list[BlockSource]:
        """Convert the blocks to this store's format, on the meta device, and pair each with its file.

        Args:
            weight_format: one that is stored as this store's is, to compute in.

        Raises:
            OtherLayout: the layout is not the one that was written.
        """
        dtype = DTYPES[self.manifest.dtype]
        modules = blocks.converted(weight_format or self.manifest.weight_format, dtype).modules
        layouts = [layout_of(module, "", dtype) for module in modules]
        # Encoding takes the first layers of a whole text encoder, which are all alike.
        others = layouts[-1:] * (len(self.manifest.block_bytes) - len(layouts))
        if layout_digest([*layouts, *others]) != self.manifest.layout:
            raise OtherLayout(
                self.folder,
                f"{self.folder} was prepared for another model, or by another release of diffusers or transformers",
                self.manifest.layout,
            )
        return [self._block(index, layout) for index, layout in enumerate(layouts)]

    def verify(self) -> Iterator[str]:
        """Read everything and compare checksums; a line for each block that differs."""
        largest = allocate(max(self.manifest.block_bytes, default=0), torch.device("cpu"))
        for index, size in enumerate(self.manifest.block_bytes):
            try:
                self._block(index, Layout((), size)).read_into(largest[:size], direct=True)
            except EntryDamaged as damage:
                yield damage.what

    def _block(self, index: int, layout: Layout) -> StoredBlock:
        return StoredBlock(layout, block_path(self.folder, index), self.manifest.checksums[index])


def find(folder: Path, component: str, weight_format: str, dtype: str, cache: Path) -> PreparedStore | None:
    """The finished entry for a component as its files are now, or None. That of the whole text encoder serves for the
    layers that encoding takes.

    Raises:
        EntryDamaged: it is there, but not whole.
    """
    for name in (component, WHOLE_TEXT_ENCODER) if component == "text_encoder" else (component,):
        final = entry_folder(cache, entry_of(folder, name, weight_format, dtype).name)
        if final.exists():
            return PreparedStore.open(final)
    return None


def layout_digest(layouts: Sequence[Layout]) -> str:
    """Which tensor lies where in each block: a release of diffusers that names or orders them otherwise is seen."""
    places = [(place.name, place.offset, place.shape, str(place.dtype)) for each in layouts for place in each.places]
    return hashlib.sha256(repr((places, [each.total_bytes for each in layouts])).encode()).hexdigest()
