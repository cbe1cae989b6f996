"""The hub's client, for configs: snapshots in its cache, small downloads, and its errors said with what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lowmem_flux2.errors import CheckpointAccess, CheckpointBroken, CheckpointError, CheckpointMissing
from lowmem_flux2.planning.configs import CONFIG_FILES, OWN_CONFIG_FILE

_NO_TOKEN: Final = "log in with `hf auth login` (or set HF_TOKEN)"
_HTTP_CLIENTS: Final = ("httpx", "httpx2", "httpcore")  # their errors pass through huggingface_hub unwrapped
_LOCAL_HINT: Final = "give a folder that holds the model instead: -m /path/to/model"


@contextmanager
def hub_client(offline: bool) -> Iterator[bool]:
    """Use the hub's client in this block; yields whether it must stay offline.

    ``local_files_only`` alone does not keep it from the network: huggingface_hub 2.4 still asks the hub for a list by
    which it tells who calls. Its own switch does, which is read from HF_HUB_OFFLINE once, when it is imported.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield constants.HF_HUB_OFFLINE
    finally:
        constants.HF_HUB_OFFLINE = before


def cached_snapshot(repo_id: str, cache_dir: Path | None, revision: str | None) -> Path | None:
    """Folder of the repository's snapshot in the local hub cache, without touching the network."""
    if cache_dir is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        cache_dir = Path(HF_HUB_CACHE)
    # Looked up by hand first: importing the hub's client takes a quarter of a second, and most often nothing is there.
    if not (cache_dir / f"models--{repo_id.replace('/', '--')}").is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo_id, CONFIG_FILES["model_index"], cache_dir=cache_dir, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def download_configs(repo_id: str, cache_dir: Path | None, revision: str | None, offline: bool) -> Path:
    """Fetch a repository's small JSON files into the hub cache and return the snapshot's folder."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = Path()
    for file in (*CONFIG_FILES.values(), OWN_CONFIG_FILE):
        try:
            with hub_client(offline) as is_offline:
                downloaded = hf_hub_download(
                    repo_id, file, cache_dir=cache_dir, revision=revision, local_files_only=is_offline
                )
        except Exception as error:
            if file == OWN_CONFIG_FILE and isinstance(error, EntryNotFoundError):
                continue
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise CheckpointBroken(
                    f"{repo_id} on the hub is not a diffusers repository: it has no {file}"
                ) from error
            explained = explain_hub_error(repo_id, revision, error)
            if explained is None:
                raise
            raise explained from error
        if file == CONFIG_FILES["model_index"]:
            folder = Path(downloaded).parent
    return folder


def explain_hub_error(repo_id: str, revision: str | None, error: BaseException) -> CheckpointError | None:
    """Turn an error of the hub's client into one that says what to do; None if it is none of the expected ones."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    said = str(getattr(error, "server_message", None) or "")
    if status == 401 and "Invalid" in said and get_token() is not None:
        return CheckpointAccess(f"{repo_id}: the hub refuses your token ({said}): log in again with `hf auth login`")
    if status == 403 and "fine-grained" in said:
        return CheckpointAccess(
            f"{repo_id} is gated and your token may not read gated repositories: give it that permission at "
            "https://huggingface.co/settings/tokens"
        )
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not isinstance(error, RepositoryNotFoundError)):
        if get_token() is None:
            return CheckpointAccess(f"{repo_id} is gated: accept its licence at {page}, then {_NO_TOKEN}")
        return CheckpointAccess(
            f"{repo_id} is gated and your account has no access: accept its licence at {page} with the account that "
            "the token belongs to"
        )
    if isinstance(error, RepositoryNotFoundError):
        private = "" if get_token() else f"; if it is private, {_NO_TOKEN}"
        return CheckpointMissing(f"there is no repository {repo_id} on the hub, and no such local folder{private}")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointMissing(f"{repo_id} has no revision {revision!r}")
    if isinstance(error, HFValidationError):
        return CheckpointMissing(f"{repo_id} is neither a local folder nor a valid hub id: {error}")
    if status is not None and (status == 429 or status >= 500):
        return CheckpointMissing(
            f"{repo_id}: the hub is too busy or out of order (it answers {status}): run the command again in a while; "
            "files that have arrived are kept"
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return CheckpointMissing(
            f"{repo_id}: a file did not arrive whole: run the command again, which fetches it anew ({error})"
        )
    unreachable = (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)  # OfflineModeIsEnabled too
    if isinstance(error, unreachable) or type(error).__module__.split(".")[0] in _HTTP_CLIENTS:
        return CheckpointMissing(
            f"{repo_id} is not in the local hub cache, or not all of it, and the hub cannot be reached, or must not be "
            f"({type(error).__name__}): connect once to fetch it, or {_LOCAL_HINT}"
        )
    written = isinstance(error, OSError)
    return CheckpointMissing(f"{repo_id} could not be written to the hub cache: {error}") if written else None
