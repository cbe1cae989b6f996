"""Fetch a hub model's weights into the hub's own cache, with its progress bars and resuming: only what a run needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lowmem_flux2.errors import CheckpointMissing, DoesNotFit
from lowmem_flux2.planning.headers import read_index
from lowmem_flux2.planning.sources import ModelSource, explain_hub_error, hub_client, resolve_model

_PARTS = ("scheduler/*", "tokenizer/*", "transformer/*", "text_encoder/*", "vae/*", "*.json")
_PICKLES = ("*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx")
SPARE_BYTES = 64 << 20
"""Left free on the disk for others."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file of the repository. ``missing_bytes`` is 0 for one that is in the cache."""

    name: str
    missing_bytes: int


def with_weights(source: ModelSource, *, offline: bool) -> ModelSource:
    """The source with a folder that holds all needed weights, downloading them where they are on the hub only.

    Of the text encoder only the shards with used layers are fetched. The hub's client goes on where an earlier download
    was cut off.

    Raises:
        CheckpointMissing, CheckpointAccess: not to be had; the message says why and what to do.
        DoesNotFit: the disk is too small, before the first byte of a weight.
    """
    if source.folder is not None:
        return source
    if source.repo_id is None:
        raise CheckpointMissing(
            f"{source.spec.source} has configs but no weights; plan it, or give a folder with weights"
        )
    from huggingface_hub import snapshot_download

    try:
        with hub_client(offline) as is_offline:
            snapshot_download(
                source.repo_id,
                revision=source.revision,
                allow_patterns=list(_PARTS) if is_offline else _needed(source),
                ignore_patterns=list(_PICKLES),
                local_files_only=is_offline,
            )
    except (CheckpointMissing, DoesNotFit):
        raise
    except Exception as error:
        explained = explain_hub_error(source.repo_id, source.revision, error)
        if explained is None:
            raise
        raise explained from error
    found = resolve_model(source.name, revision=source.revision, offline=True)
    if found.folder is None:
        raise CheckpointMissing(
            f"{source.repo_id}: the download is not complete; run the command again to go on with it"
        )
    return found


def _needed(source: ModelSource) -> list[str]:
    """Names of the files to fetch, once it is sure that they fit the disk.

    Raises:
        DoesNotFit: the disk is too small.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    assert source.repo_id is not None
    listed = snapshot_download(
        source.repo_id,
        revision=source.revision,
        allow_patterns=list(_PARTS),
        ignore_patterns=list(_PICKLES),
        dry_run=True,
    )
    files = [_File(entry.filename, (entry.file_size or 0) if entry.will_download else 0) for entry in listed]
    unused: set[str] = set()
    for file in files:
        if file.name.startswith("text_encoder/") and file.name.endswith(".index.json"):
            index = hf_hub_download(source.repo_id, file.name, revision=source.revision)
            places = read_index(Path(index))
            used = {shard for tensor, shard in places.items() if source.spec.needs("text_encoder", tensor)}
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
