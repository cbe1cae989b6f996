"""Quantize a component once into the prepared store: block by block, resumable, locked, atomic."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from lowmem_flux2.errors import DoesNotFit, UsageError
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.report import write_atomically
from lowmem_flux2.runtime.cache import MANIFEST
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.components import (
    Blocks,
    text_decoder_blocks,
    text_decoder_on_meta,
    text_decoder_root,
    transformer_blocks,
    transformer_on_meta,
)
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import Layout, allocate, layout_of
from lowmem_flux2.runtime.quantize import STORED, StoredLinear
from lowmem_flux2.runtime.store import LIBRARIES, SCHEMA, Entry, PreparedStore, block_path, entry_of, layout_digest

SOURCE = "source.txt"
"""In an unfinished entry: what it is being made of, so that it goes too when the source has changed."""
SPARE_BYTES = 64 << 20
"""Left free on the disk for the manifest and for others."""


def prepare(
    folder: Path,
    model: ModelSpec,
    component: str,
    weight_format: str,
    dtype: str,
    cache: Path,
    on_start: Callable[[int], None] = lambda blocks: None,
    on_block: Callable[[], None] = lambda: None,
) -> PreparedStore:
    """Quantize a component block by block into the store, or return the entry that is there.

    Holds one block's stored span and one Linear's full weight at a time, whatever the model's size.

    Raises:
        DoesNotFit: the disk is too small, before the first byte.
        UsageError: the cache cannot be written.
        CheckpointBroken: the source's weights are not what its config implies.
    """
    entry = entry_of(folder, component, weight_format, dtype)
    root = cache / "prepared"
    final, partial = root / entry.name, root / f".partial-{entry.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{entry.name}.lock"):
            if final.exists():
                return PreparedStore.open(final)
            _remove_stale(root, entry, folder)
            partial.mkdir(exist_ok=True)
            write_atomically(partial / SOURCE, str(folder.resolve()))
            with TensorFile(folder / component) as files:
                blocks = component_blocks(folder, model, component, files)
                prefixes = blocks.prefixes
                blocks.converted(weight_format, DTYPES[dtype])
                layouts = [
                    layout_of(module, prefix, DTYPES[dtype])
                    for module, prefix in zip(blocks.modules, prefixes, strict=True)
                ]
                missing = [index for index in range(len(layouts)) if not block_path(partial, index).exists()]
                _check_disk(partial, sum(layouts[index].total_bytes for index in missing))
                on_start(len(missing))
                for index in missing:
                    span = allocate(layouts[index].total_bytes, torch.device("cpu"))
                    span.zero_()  # the padding between tensors is part of the file
                    _fill(blocks.modules[index], prefixes[index], layouts[index], files, span, DTYPES[dtype])
                    _write_block(partial, index, span)
                    on_block()
            _write_manifest(partial, entry, folder, layouts)
            partial.rename(final)
            _sync_folder(root)
    except OSError as error:
        raise UsageError(f"{root} cannot be written: {error}; give another folder with --cache-dir") from error
    return PreparedStore.open(final)


def _fill(
    module: torch.nn.Module, prefix: str, layout: Layout, files: TensorFile, span: torch.Tensor, dtype: torch.dtype
) -> None:
    """Read and quantize one block into its span, one Linear at a time."""
    quantized: dict[str, torch.Tensor] = {}
    for place in layout.places:
        owner_name, _, leaf = place.name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if not (isinstance(owner, StoredLinear) and leaf in owner._buffers):
            files.read_into(prefix + place.name, place.view(span))
            continue
        if f"{owner_name}.{leaf}" not in quantized:  # the first of its storage tensors
            weight = torch.empty(owner.out_features, owner.in_features, dtype=dtype)
            files.read_into(f"{prefix}{owner_name}.weight", weight)
            stored = STORED[owner.format_name].quantize(weight, dtype)
            quantized = {f"{owner_name}.{name}": tensor for name, tensor in stored.items()}
        place.view(span).copy_(quantized[place.name].view(place.shape))


def component_blocks(folder: Path, model: ModelSpec, component: str, files: TensorFile) -> Blocks:
    """The streamable blocks of ``transformer`` or ``text_encoder``, on the meta device."""
    if component == "transformer":
        return transformer_blocks(transformer_on_meta(folder / component))
    return text_decoder_blocks(text_decoder_on_meta(folder / component, model), text_decoder_root(files))


def _write_block(folder: Path, index: int, span: torch.Tensor) -> None:
    path = block_path(folder, index)
    temporary = path.with_suffix(".tmp")
    raw = memoryview(span.numpy().data)
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    write_atomically(path.with_suffix(".json"), json.dumps({"blake2b": hashlib.blake2b(raw).hexdigest()}))
    temporary.replace(path)


def _write_manifest(partial: Path, entry: Entry, folder: Path, layouts: Sequence[Layout]) -> None:
    checksums = [
        json.loads(block_path(partial, index).with_suffix(".json").read_text())["blake2b"]
        for index in range(len(layouts))
    ]
    manifest = {
        **asdict(entry),
        "schema": SCHEMA,
        "source": str(folder.resolve()),
        "block_bytes": [layout.total_bytes for layout in layouts],
        "checksums": checksums,
        "layout": layout_digest(layouts),
        "versions": {name: metadata.version(name) for name in ("torch", *LIBRARIES.values()) if _installed(name)},
    }
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _sync_folder(partial)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + SPARE_BYTES:
        raise DoesNotFit(
            "prepare", "disk", needed_bytes + SPARE_BYTES, free, [f"--cache-dir on a disk with more than {folder} has"]
        )


def _remove_stale(root: Path, entry: Entry, folder: Path) -> None:
    """Drop entries, finished or not, of the same source, component and format whose source has changed since."""
    kind = f"{entry.component}-{entry.weight_format}-{entry.dtype}-"
    for other in (*root.glob(f"{kind}*/{SOURCE}"), *root.glob(f".partial-{kind}*/{SOURCE}")):
        if other.parent.name.removeprefix(".partial-") == entry.name:
            continue
        with suppress(OSError):
            if other.read_text(encoding="utf-8") == str(folder.resolve()):
                shutil.rmtree(other.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the entry's lock; a second process waits here and then finds the entry made."""
    with path.open("a") as file:
        if os.name != "nt":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
