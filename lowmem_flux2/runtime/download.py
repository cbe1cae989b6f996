"""Fetch a hub model's weights into the hub's own cache, with its progress bars and resuming."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowmem_flux2.errors import CheckpointMissing, DoesNotFit
from lowmem_flux2.planning.formats import DTYPE_BYTES
from lowmem_flux2.planning.sources import ModelSource, explain_hub_error, resolve_model

_PARTS = ("scheduler/*", "tokenizer/*", "transformer/*", "text_encoder/*", "vae/*", "*.json")


def with_weights(source: ModelSource, *, offline: bool) -> ModelSource:
    """The source with a folder that holds all weights, downloading them where they are on the hub only.

    Raises:
        CheckpointMissing, CheckpointAccess: not to be had; the message says why and what to do.
    """
    if source.folder is not None:
        return source
    if source.repo_id is None:
        raise CheckpointMissing(
            f"{source.spec.source} has configs but no weights; plan it, or give a folder with weights"
        )
    _check_disk(source)
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source.repo_id,
            revision=source.revision,
            allow_patterns=list(_PARTS),
            local_files_only=offline,
        )
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


def _check_disk(source: ModelSource) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    spec = source.spec
    weights = spec.transformer.total_weights + spec.text_encoder.full_weights + spec.vae.total_weights
    needed, free = weights * DTYPE_BYTES[spec.stored_dtype], shutil.disk_usage(folder).free
    blobs = Path(HF_HUB_CACHE) / f"models--{str(source.repo_id).replace('/', '--')}" / "blobs"
    there = sum(path.stat().st_size for path in blobs.glob("*")) if blobs.is_dir() else 0
    if free < needed - there:
        remedy = f"HF_HOME=FOLDER lowmem-flux2 ...   # a disk with more than {folder} has, or a local folder with -m"
        raise DoesNotFit("download", "disk", needed - there, free, [remedy])
