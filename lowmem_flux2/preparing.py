"""``lowmem-flux2 prepare``: make, list, verify and remove entries of the prepared store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lowmem_flux2.console import ConsoleObserver
from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.job import Machine
from lowmem_flux2.planning.plan import WHOLE_TEXT_ENCODER, Plan
from lowmem_flux2.planning.preparation import SPARE_BYTES, Prepared
from lowmem_flux2.planning.selection import Selection, check_selection, compute_dtype
from lowmem_flux2.planning.sources import ModelSource
from lowmem_flux2.planning.support import LIBRARY_OF, SUPPORTED
from lowmem_flux2.runtime.cache import (
    MANIFEST,
    PARTIAL,
    EntryDamaged,
    clear_prompts,
    entry_folder,
    locked,
    prompt_files,
)
from lowmem_flux2.units import format_bytes

PROMPTS = "prompts"
"""The prompt cache's name among the entries."""


def cache_of(given: Path | None) -> Path:
    """The folder with all entries."""
    return cache_folder(given)


def _entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in (cache / "prepared").glob(f"*/{MANIFEST}") if path.parent.name[0] != ".")


def prepared_of(source: ModelSource, cache: Path) -> Prepared:
    """What the store holds of a model whose files are here, by its manifests. Never imports torch.

    An entry of files that have changed since counts too: a run sees that, and prepares anew.
    """
    found: set[tuple[str, str, str]] = set()
    if source.folder is None:
        return found
    for folder in _entries(cache):
        with suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if raw["source"] == str(source.folder.resolve()):
                found.add((raw["component"], raw["weight_format"], raw["dtype"]))
    return found


def room_warning(plan: Plan, cache: Path) -> str:
    """What the store's disk lacks of what the plan is to prepare, in words; empty where there is room.

    At the most: blocks of an interrupted preparation are kept, and entries of files that have changed make room.
    """
    needed = sum(each.write_bytes for each in plan.preparations)
    folder = cache.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not needed or free >= needed + SPARE_BYTES:
        return ""
    return (
        f"no room to prepare: {format_bytes(needed + SPARE_BYTES)} of disk are needed at {cache}, {format_bytes(free)} "
        "are free: give --cache-dir on another disk, make room ('lowmem-flux2 prepare --list'), or take unquantized "
        "weights (--weight-format, --text-weight-format)"
    )


def _unfinished(cache: Path) -> list[Path]:
    return sorted((cache / "prepared").glob(f"{PARTIAL}*"))


def listing(cache: Path) -> Table:
    """Name, size and source of each entry, finished or not. Never imports torch."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("name", "size", "blocks", "source"):
        table.add_column(heading, justify="right" if heading in ("size", "blocks") else "left", overflow="fold")
    for folder in _entries(cache):
        try:
            raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            row = format_bytes(sum(raw["block_bytes"])), str(len(raw["block_bytes"])), str(raw["source"])
        except (OSError, ValueError, KeyError, TypeError):
            row = "-", "-", f"damaged: its {MANIFEST} cannot be read"
        table.add_row(folder.name, *row)
    for folder in _unfinished(cache):
        with suppress(OSError):  # finished meanwhile
            sizes = [path.stat().st_size for path in folder.glob("block-*.bin")]
            row = format_bytes(sum(sizes)), str(len(sizes)), "unfinished: preparing the same again goes on with it"
            table.add_row(folder.name.removeprefix(PARTIAL), *row)
    if prompts := prompt_files(cache):
        size = sum(entry.size_bytes for entry in prompts)
        table.add_row(PROMPTS, format_bytes(size), "-", f"the prompt cache: {len(prompts)} batches of prompts")
    return table


def verify(cache: Path, out: Console) -> None:
    """Compare every block with its checksum.

    Raises:
        CheckpointBroken: names each block whose bytes are not those that were written.
    """
    from lowmem_flux2.runtime.store import PreparedStore

    faults: list[str] = []
    for folder in _entries(cache):
        try:
            found = list(PreparedStore.open(folder).verify())
        except EntryDamaged as damage:
            found = [damage.what]
        out.print(f"{folder.name}: {'damaged' if found else 'whole'}", soft_wrap=True)
        faults += found
    if faults:
        raise CheckpointBroken(
            "\n".join([*faults, "the next run that needs it makes it anew; --remove NAME makes room at once"])
        )


def remove(cache: Path, name: str) -> None:
    """Remove one entry, finished or not, or the whole prompt cache under its name.

    Raises:
        UsageError: no entry of that name, being prepared at this moment, or the cache cannot be written.
    """

    def refuse() -> None:
        raise UsageError(f"--remove {name}: another process is preparing it")

    try:
        if name == PROMPTS:
            clear_prompts(cache)
            return
        final = entry_folder(cache, name)
        both = (final, final.with_name(f"{PARTIAL}{name}"))
        found = [folder for folder in both if folder in (*_entries(cache), *_unfinished(cache))]
        if not found:
            raise UsageError(f"--remove {name}: no such entry; --list shows them")
        with locked(final, on_wait=refuse):
            for folder in found:
                shutil.rmtree(folder)
    except OSError as error:
        raise UsageError(f"--remove {name}: {cache} cannot be written: {error}") from error


def prepare_all(
    source: ModelSource,
    machine: Machine,
    weight_format: str,
    components: Sequence[str],
    dtype: str,
    cache: Path,
    offline: bool,
    out: Console,
    err: Console,
) -> None:
    """Prepare components one after the other; what is there already is left as it is.

    Raises:
        UsageError: a format that is not quantized, unknown, or whose library is missing.
    """
    selection = Selection(weight_format=weight_format, dtype=dtype)
    check_selection(selection, machine.hardware)
    if not FORMATS[weight_format].is_prepared:
        raise UsageError(f"--weight-format {weight_format}: such weights are read from the checkpoint as they are")
    if weight_format not in SUPPORTED.weight_formats:
        raise UsageError(f"--weight-format {weight_format}: {LIBRARY_OF[weight_format]} is not installed")
    from lowmem_flux2.runtime.download import with_weights, with_whole_text_encoder
    from lowmem_flux2.runtime.prepare import prepare

    found = with_weights(source, offline=offline)
    if WHOLE_TEXT_ENCODER in components:
        found = with_whole_text_encoder(found, offline=offline)
    assert found.folder is not None
    with ConsoleObserver(err, quiet=False) as observer:
        for component in components:
            store = prepare(
                found.folder,
                found.spec,
                component,
                weight_format,
                compute_dtype(selection, machine.hardware),
                cache,
                on_start=lambda blocks: observer.stage_started("prepare", blocks),
                on_block=observer.advanced,
                on_end=lambda: observer.stage_finished("prepare"),
                on_event=observer.event,
            )
            out.print(f"{store.folder}   {format_bytes(store.total_bytes)}", soft_wrap=True)
