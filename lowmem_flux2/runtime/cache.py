"""Where prepared weights and embeddings of prompts are kept, and locks. Imports no torch: listing must be quick."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.units import GIB, parse_bytes

MANIFEST = "manifest.json"
"""Written last into an entry: what has it is whole."""
PARTIAL = ".partial-"
"""Precedes the name of an entry that is not finished."""
PROMPT_CACHE_BYTES = GIB
"""Default limit of the prompt cache: 68 prompts of 512 tokens for dev (15 MiB each), 136 for klein-4b."""


@dataclass(frozen=True, slots=True)
class PromptFile:
    """One entry of the prompt cache; ``used_at`` in seconds since the epoch."""

    path: Path
    size_bytes: int
    used_at: float


def prompt_cache_limit(given: int | str | None = None) -> int:
    """Bytes that the prompt cache may hold, 0 for none: ``--prompt-cache``, else LOWMEM_FLUX2_PROMPT_CACHE, else 1 GiB.

    Raises:
        UsageError: neither a size nor ``off``.
    """
    name = "--prompt-cache"
    if given is None:
        name, given = "LOWMEM_FLUX2_PROMPT_CACHE", os.environ.get("LOWMEM_FLUX2_PROMPT_CACHE")
    if given is None or given == "":
        return PROMPT_CACHE_BYTES
    if isinstance(given, int):
        if given < 0:
            raise UsageError(f"prompt_cache: {given} bytes: 0 for none, or more")
        return given
    if given.strip().lower() in ("off", "0"):
        return 0
    try:
        return parse_bytes(given)
    except UsageError as error:
        raise UsageError(f"{name}: {error}, or off") from None


def prompts_folder(cache: Path) -> Path:
    return cache / "prompts"


def prompt_files(cache: Path) -> list[PromptFile]:
    """Every entry of the prompt cache; none where there is no such folder."""
    found = []
    for path in prompts_folder(cache).glob("*.safetensors"):
        with suppress(OSError):  # another process dropped it meanwhile
            seen = path.stat()
            found.append(PromptFile(path, seen.st_size, seen.st_mtime))
    return found


def clear_prompts(cache: Path) -> int:
    """Remove every entry of the prompt cache; returns how many there were."""
    entries = prompt_files(cache)
    for entry in entries:
        entry.path.unlink(missing_ok=True)
    return len(entries)


def entry_folder(cache: Path, name: str) -> Path:
    return cache / "prepared" / name


class EntryDamaged(CheckpointBroken):
    """An entry's manifest, or a block's file, is gone or not what was written.

    Attributes:
        folder: the entry's.
        what: is wrong, without the remedy.
    """

    def __init__(self, folder: Path, what: str) -> None:
        super().__init__(
            f"{what}; remove the entry, and it is made again when it is next needed: lowmem-flux2 prepare "
            f"--remove {folder.name} --cache-dir {shlex.quote(str(folder.parent.parent))}"
        )
        self.folder, self.what = folder, what

    def set_aside(self) -> None:
        """Remove what cannot be seen to be damaged without reading it, so that preparing the entry makes it again.

        Raises:
            OSError: it cannot be removed.
        """


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an entry's folder; ``on_wait`` is told once if another process has it, which is then awaited.

    The system frees it when its holder ends, however that may be; the file goes with it, unless its holder was killed.

    Raises:
        OSError: the cache cannot be written.
    """
    path = folder.with_name(f"{folder.name.removeprefix(PARTIAL)}.lock")
    while True:
        with path.open("a") as file:
            if not _is_held(file, path, on_wait):
                continue
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps a file that is open
                    path.unlink()
            return


def _is_held(file: TextIO, path: Path, on_wait: Callable[[], None]) -> bool:
    """Lock an open file; False where its last holder has removed it, and others lock a new one."""
    if os.name == "nt":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
