"""An entry of the prepared store is made once: locked, resumable, atomic, and refused with a reason."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from lowmem_flux2.errors import CheckpointBroken, DoesNotFit, LowMemFlux2Error, UsageError
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.preparation import SPARE_BYTES
from lowmem_flux2.report import write_atomically
from lowmem_flux2.runtime.blockfile import written_checksums
from lowmem_flux2.runtime.cache import MANIFEST, PARTIAL, EntryDamaged, entry_folder, locked
from lowmem_flux2.runtime.checkpoint import TensorFile
from lowmem_flux2.runtime.conversion import Conversion
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import Layout
from lowmem_flux2.runtime.store import (
    LIBRARIES,
    SCHEMA,
    Entry,
    Manifest,
    PreparedStore,
    entry_of,
    files_of,
    find,
    layout_digest,
)
from lowmem_flux2.units import format_bytes

SOURCE = "source.txt"
"""In an entry: what it is made of, so that it goes when the source has changed, finished or not."""
_OF_SOURCE = ("*.json", "*.safetensors", "*.gguf")
_DISK_IS_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def prepare(
    folder: Path,
    model: ModelSpec,
    component: str,
    weight_format: str,
    dtype: str,
    cache: Path,
    on_start: Callable[[int], None] = lambda blocks: None,
    on_block: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
    on_event: Callable[[str], None] = lambda text: None,
    damage: EntryDamaged | None = None,
) -> PreparedStore:
    """Quantize a component block by block into the store, or return the entry that is there; of a damaged one, what is
    whole is kept.

    Args:
        on_start: told how many blocks are to be made.
        on_block: told that one is in the store.
        on_end: told that all are; not called where there was nothing to make.
        on_event: told, in a sentence, that another process is at it already and is waited for, or of damage.
        damage: was found in the entry while it was read.

    Raises:
        DoesNotFit: the disk is too small, before the first byte, or filled up meanwhile.
        UsageError: the cache cannot be written.
        CheckpointBroken: the source cannot be read, is not what its config implies, or changed meanwhile.
    """
    try:  # writes nothing: the cache may be read-only
        found = find(folder, component, weight_format, dtype, cache) if damage is None else None
    except EntryDamaged as error:
        found, damage = None, error
    if damage is not None:
        on_event(f"{damage.what}: prepared anew")
    if found is not None:
        return found
    source = folder / files_of(component)
    stamp = _stamp(source)
    entry = entry_of(folder, component, weight_format, dtype)
    final = entry_folder(cache, entry.name)
    partial = final.with_name(f"{PARTIAL}{entry.name}")
    waiting = f"another process is preparing the {component} in {weight_format}: waiting for it to finish"
    job: Conversion | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final, on_wait=lambda: on_event(waiting)):
            if damage is not None and damage.folder == final:
                damage.set_aside()
                _reopen(final, partial)
            if final.exists():
                return PreparedStore.open(final)
            _remove_stale(entry, folder, final.parent)
            with TensorFile(source) as files, _unfinished(partial):
                job = Conversion.of(folder, model, component, weight_format, DTYPES[dtype], files)
                _check_disk(cache, job.bytes_missing(partial))
                write_atomically(partial / SOURCE, str(folder.resolve()))
                on_start(len(job.missing(partial)))
                job.run(partial, on_block, lambda: _check_stamp(source, stamp))
                write_atomically(partial / MANIFEST, _manifest(partial, entry, folder, job.layouts).text())
                _sync_folder(partial)
                partial.rename(final)
            _sync_folder(final.parent)
            on_end()
    except OSError as error:  # of the cache alone: reading the source raises CheckpointBroken
        raise _refusal(error, cache, partial, job.bytes_missing(partial) if job else 0) from error
    return PreparedStore.open(final)


def _reopen(final: Path, partial: Path) -> None:
    """Make a damaged entry an unfinished one, unless another process has mended it meanwhile."""
    with suppress(EntryDamaged, FileNotFoundError):
        PreparedStore.open(final)
        return
    shutil.rmtree(partial, ignore_errors=True)
    final.rename(partial)
    (partial / MANIFEST).unlink(missing_ok=True)


class _SourceChanged(CheckpointBroken):
    """The source's files are not those that were there at the start."""


def _stamp(folder: Path) -> list[tuple[str, int, int, int, int]]:
    """What a write to a file of the source changes. Not kept: see ``entry_of`` for why times of change are too much."""
    try:
        seen = [
            (path.name, path.stat()) for path in sorted(path for ending in _OF_SOURCE for path in folder.glob(ending))
        ]
    except OSError as error:
        raise CheckpointBroken(f"{folder} cannot be read: {error}") from error
    return [(name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for name, at in seen]


def _check_stamp(folder: Path, stamp: Sequence[object]) -> None:
    if _stamp(folder) != stamp:
        raise _SourceChanged(f"{folder} was changed while it was prepared: nothing of it is kept; run again")


@contextmanager
def _unfinished(partial: Path) -> Iterator[None]:
    """Make an entry in this folder. Where it stays unfinished, it is kept only for finished blocks that still serve."""
    partial.mkdir(exist_ok=True)
    for left in partial.glob("*.tmp"):  # by a run that was killed
        left.unlink()
    try:
        yield
    except BaseException as error:
        if isinstance(error, _SourceChanged) or not _blocks_of(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _blocks_of(partial: Path) -> list[Path]:
    return list(partial.glob("block-*.bin"))


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


def _manifest(partial: Path, entry: Entry, folder: Path, layouts: Sequence[Layout]) -> Manifest:
    return Manifest(
        **asdict(entry),
        schema=SCHEMA,
        source=str(folder.resolve()),
        block_bytes=tuple(layout.total_bytes for layout in layouts),
        checksums=tuple(tuple(written_checksums(partial, index)) for index in range(len(layouts))),
        layout=layout_digest(layouts),
        versions={name: metadata.version(name) for name in ("torch", *LIBRARIES.values()) if _installed(name)},
    )


def _check_disk(cache: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(cache).free
    if free < needed_bytes + SPARE_BYTES:
        raise DoesNotFit("prepare", "disk", needed_bytes + SPARE_BYTES, free, [_elsewhere(cache)])


def _elsewhere(cache: Path) -> str:
    return f"--cache-dir on another disk than that of {cache}, or room on it (lowmem-flux2 prepare --list, --remove)"


def _refusal(error: OSError, cache: Path, partial: Path, needed_bytes: int) -> LowMemFlux2Error:
    """What it means that the cache could not be written with so many bytes to come. Finished blocks are kept."""
    if error.errno not in _DISK_IS_FULL:
        return UsageError(f"{cache} cannot be written: {error}; give another folder with --cache-dir")
    free = shutil.disk_usage(next(each for each in (cache, *cache.absolute().parents) if each.exists())).free
    done = len(_blocks_of(partial))
    kept = f"; {done} finished blocks are kept, and taken over by the next run" if done else ""
    if free < needed_bytes:
        return DoesNotFit("prepare", "disk", needed_bytes, free, [_elsewhere(cache) + kept])
    return UsageError(
        f"{cache}: the system takes no more ({error.strerror}), a quota or a limit on file sizes, perhaps: "
        f"{format_bytes(needed_bytes)} were still to be written, {format_bytes(free)} are free{kept}"
    )


def _remove_stale(entry: Entry, folder: Path, root: Path) -> None:
    """Drop entries, finished or not, of the same source, component and format whose source has changed since."""
    kind = f"{entry.component}-{entry.weight_format}-{entry.dtype}-"
    for other in (*root.glob(f"{kind}*/{SOURCE}"), *root.glob(f"{PARTIAL}{kind}*/{SOURCE}")):
        if other.parent.name.removeprefix(PARTIAL) == entry.name:
            continue
        with suppress(OSError):
            if other.read_text(encoding="utf-8") == str(folder.resolve()):
                shutil.rmtree(other.parent)
