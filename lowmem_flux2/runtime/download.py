"""Fetch a hub model's weights into the hub's own cache, with its progress bars and resuming: only what a run needs."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from lowmem_flux2.errors import CheckpointMissing, DoesNotFit
from lowmem_flux2.planning.headers import FileHeader
from lowmem_flux2.planning.hub import explain_hub_error, hub_client
from lowmem_flux2.planning.models import Component
from lowmem_flux2.planning.sources import ModelSource, SingleFile, SinglePart, hub_configs, resolve_model
from lowmem_flux2.planning.stored import check_decodable, model_view
from lowmem_flux2.planning.weight_files import component_headers, every_tensor, read_index, weight_header

_PARTS = ("scheduler/*", "tokenizer/*", "transformer/*", "text_encoder/*", "vae/*", "*.json")
_PICKLES = ("*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx")
_FILES_OF: Mapping[SinglePart, tuple[str, ...]] = {
    "tokenizer": ("tokenizer/*", "*.json"),
    "text_encoder": ("scheduler/*", "tokenizer/*", "text_encoder/*", "*.json"),
    "vae": ("vae/*", "*.json"),
}
"""Of the parts that go with a single file."""
SPARE_BYTES = 64 << 20
"""Left free on the disk for others."""
TRIES, WAIT_S, LONGEST_WAIT_S = 3, 10, 120
"""How often a hub is asked that is out of order, and how long waited for where it does not say, or says too long."""
STALE_S = 3600
"""A download that has written nothing for so long is not under way: its client gives up after ten seconds."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file of the repository. ``missing_bytes`` is 0 for one that is in the cache."""

    name: str
    missing_bytes: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Files of one repository."""

    repo_id: str
    revision: str | None
    patterns: tuple[str, ...]
    needs: Callable[[Component, str], bool]


def with_weights(source: ModelSource, *, offline: bool) -> ModelSource:
    """The source with a folder that holds all needed weights, downloading them where they are on the hub only.

    Of the text encoder only the shards with used layers are fetched. The hub's client goes on with a file whose
    transfer breaks off; the next run keeps whole files, and fetches anew those that a run was killed in.

    Raises:
        CheckpointMissing, CheckpointAccess: not to be had; the message says why and what to do.
        DoesNotFit: the disk is too small, before the first byte of a weight.
        UsageError: a library that decodes them is not installed; rather now than after a stage.
    """
    if source.single is not None:
        _check_decodable((weight_header(source.single.file),))
    if source.folder is not None:
        for part in get_args(Component):
            if (source.folder / part).is_dir():  # one that is gone is missed by the stage that reads it, if any does
                _check_decodable(component_headers(source.folder / part, partial(source.spec.needs, part)))
        return source
    if source.single is not None:
        return _with_parts(source, source.single, offline)
    if source.repo_id is None:
        raise CheckpointMissing(
            f"{source.spec.source} has configs but no weights; plan it, or give a folder with weights"
        )
    _fetch(_Wanted(source.repo_id, source.revision, _PARTS, source.spec.needs), offline)
    found = resolve_model(source.name, revision=source.revision, offline=True)
    if found.folder is None:
        raise CheckpointMissing(
            f"{source.repo_id}: the download is not complete; run the command again to go on with it"
        )
    return found


def _check_decodable(headers: Iterable[FileHeader]) -> None:
    for tensor in model_view(headers).values():
        check_decodable(tensor)


def with_whole_text_encoder(source: ModelSource, *, offline: bool, sees: bool = False) -> ModelSource:
    """A source with a folder, its text encoder with all that writes text: every layer and lm_head.

    Args:
        sees: with the vision part too.

    Raises:
        CheckpointMissing, CheckpointAccess, DoesNotFit: as ``with_weights``.
    """
    assert source.folder is not None
    writes = every_tensor if sees else source.spec.text_encoder.writes_with
    try:
        component_headers(source.folder / "text_encoder", writes)
    except CheckpointMissing:
        repo_id = source.repo_id or _encoder_repository(source)
        if repo_id is None:
            raise
        patterns = ("text_encoder/*", "*.json")
        _fetch(_Wanted(repo_id, source.revision, patterns, lambda _, name: writes(name)), offline)
        component_headers(source.folder / "text_encoder", writes)
    return source


def _encoder_repository(source: ModelSource) -> str | None:
    """Where on the hub a single file's text encoder is from."""
    if source.single is None or Path(source.single.text_encoder).expanduser().exists():
        return None
    found = hub_configs(source.single.text_encoder, None, offline=True)
    return found[0] if found else None


def _with_parts(source: ModelSource, single: SingleFile, offline: bool) -> ModelSource:
    """A single file's source with the parts that were on the hub only."""
    for part in single.missing:
        _fetch(_Wanted(part.repo_id, None, _FILES_OF[part.part], source.spec.needs), offline)
    found = resolve_model(
        str(single.file),
        offline=True,
        text_encoder=single.text_encoder,
        vae=single.vae,
        tokenizer=single.tokenizer,
        cache=single.cache,
    )
    if found.folder is None:
        lacking = " and ".join(f"the {part.part} of {part.repo_id}" for part in single.missing)
        raise CheckpointMissing(f"{lacking}: the download is not complete; run the command again to go on with it")
    return found


def _fetch(wanted: _Wanted, offline: bool) -> None:
    """Download what is wanted and not in the cache."""
    from huggingface_hub import snapshot_download

    try:
        with hub_client(offline) as is_offline:
            if not is_offline:
                _remove_stale(wanted.repo_id)
            patterns = list(wanted.patterns) if is_offline else _needed(wanted)
            _patiently(
                lambda: snapshot_download(
                    wanted.repo_id,
                    revision=wanted.revision,
                    allow_patterns=patterns,
                    ignore_patterns=list(_PICKLES),
                    local_files_only=is_offline,
                )
            )
    except (CheckpointMissing, DoesNotFit):
        raise
    except Exception as error:
        explained = explain_hub_error(wanted.repo_id, wanted.revision, error)
        if explained is None:
            raise
        raise explained from error


def _patiently(download: Callable[[], object]) -> None:
    """Try again where the hub says that it is out of order for a while: its client does so for 408 and 429 alone."""
    from huggingface_hub.errors import HfHubHTTPError

    for left in reversed(range(TRIES)):
        try:
            download()
            return
        except HfHubHTTPError as error:
            if not left or error.response is None or error.response.status_code < 500:
                raise
            after = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(after) if after.isdigit() else WAIT_S, LONGEST_WAIT_S))


def _remove_stale(repo_id: str) -> None:
    """Remove what downloads that were killed have left in the cache.

    huggingface_hub 2.4 gives each download a file of its own, so nothing goes on with them, or removes them.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for left in (Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs").glob("*.*.incomplete"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > STALE_S:
                left.unlink()


def _needed(wanted: _Wanted) -> list[str]:
    """Names of the files to fetch, once it is sure that they fit the disk.

    Raises:
        DoesNotFit: the disk is too small.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    listed = snapshot_download(
        wanted.repo_id,
        revision=wanted.revision,
        allow_patterns=list(wanted.patterns),
        ignore_patterns=list(_PICKLES),
        dry_run=True,
    )
    files = [_File(entry.filename, (entry.file_size or 0) if entry.will_download else 0) for entry in listed]
    unused: set[str] = set()
    for file in files:
        if file.name.startswith("text_encoder/") and file.name.endswith(".index.json"):
            index = hf_hub_download(wanted.repo_id, file.name, revision=wanted.revision)
            places = read_index(Path(index))
            used = {shard for tensor, shard in places.items() if wanted.needs("text_encoder", tensor)}
            unused |= {f"text_encoder/{shard}" for shard in set(places.values()) - used}
    files = [file for file in files if file.name not in unused]
    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    needed, free = sum(file.missing_bytes for file in files), shutil.disk_usage(folder).free
    if needed and free < needed + SPARE_BYTES:
        remedy = f"HF_HOME=FOLDER lowmem-flux2 ...   # a disk with more than {folder} has, or a local folder with -m"
        raise DoesNotFit("download", "disk", needed + SPARE_BYTES, free, [remedy])
    return [file.name for file in files]
