"""Where a MODEL argument points: an alias, a local diffusers folder, a single file, or a hub id.

Aliases are planned from configs that ship with the package, so that ``lowmem-flux2 plan -m flux2-dev`` needs neither a
download nor a licence. A hub id that is not in the local cache costs the download of its config files, a few KiB;
weights are the runtime's to fetch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

from lowmem_flux2.errors import CheckpointAccess, CheckpointBroken, CheckpointError, CheckpointMissing, UsageError
from lowmem_flux2.planning.configs import CONFIG_FILES, OWN_CONFIG_FILE, read_configs, spec_from_configs
from lowmem_flux2.planning.models import Component, ModelSpec
from lowmem_flux2.planning.stored import model_view, packed_blocks
from lowmem_flux2.planning.weight_files import ComponentWeights, check_component

SourceKind = Literal["embedded", "local", "hub"]

ASSETS: Final = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED: Final = "shapes"


@dataclass(frozen=True, slots=True)
class _Alias:
    repo_id: str
    configs: str
    """Folder under assets/configs: a base model has its distilled sibling's shape."""
    is_distilled: bool = False


_ALIASES: Final[Mapping[str, _Alias]] = {
    "flux2-dev": _Alias("black-forest-labs/FLUX.2-dev", "flux2-dev"),
    "flux2-klein-4b": _Alias("black-forest-labs/FLUX.2-klein-4B", "flux2-klein-4b", is_distilled=True),
    "flux2-klein-9b": _Alias("black-forest-labs/FLUX.2-klein-9B", "flux2-klein-9b", is_distilled=True),
    "flux2-klein-base-4b": _Alias("black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein-4b"),
    "flux2-klein-base-9b": _Alias("black-forest-labs/FLUX.2-klein-base-9B", "flux2-klein-9b"),
}
_SYNONYMS: Final[Mapping[str, str]] = {
    "flux2-klein-4b-base": "flux2-klein-base-4b",
    "flux2-klein-9b-base": "flux2-klein-base-9b",
}
MODEL_NAMES: Final = (EMBEDDED, *_ALIASES)
"""Names that MODEL accepts besides folders and hub ids."""

TOKENIZER_FILES: Final = ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
"""A folder that lacks one of them cannot run, whatever its weights."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w")
_NO_TOKEN: Final = "log in with `hf auth login` (or set HF_TOKEN)"
_HTTP_CLIENTS: Final = ("httpx", "httpx2", "httpcore")  # their errors pass through huggingface_hub unwrapped
_LOCAL_HINT: Final = "give a folder that holds the model instead: -m /path/to/model"


@dataclass(frozen=True, slots=True)
class Missing:
    """A part of a single-file model that is still to be fetched from the hub."""

    repo_id: str
    component: Component


@dataclass(frozen=True, slots=True)
class SingleFile:
    """A transformer's file and what goes with it: arguments that resolve to the same model again.

    Attributes:
        cache: our own cache folder as it was given.
        missing: parts without which it can be planned, and not run.
    """

    file: Path
    text_encoder: str
    vae: str
    cache: Path | None
    missing: tuple[Missing, ...]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A resolved MODEL argument.

    Attributes:
        name: what plans and reports call the model.
        kind: shipped with the package, a folder of the user's, or on the hub.
        folder: diffusers folder whose weights and tokenizer are all there and match the spec; None where only
            configs are known.
        repo_id: hub id of a hub model.
        revision: hub revision asked for; None is the default branch.
        spec: built from the configs in ``folder``, or from the shipped or downloaded ones.
        configs: folder where those configs are.
        single: of a single file; ``folder`` is then one of links to it and its parts.
    """

    name: str
    kind: SourceKind
    folder: Path | None
    repo_id: str | None
    revision: str | None
    spec: ModelSpec
    configs: Path
    single: SingleFile | None = None


def resolve_model(
    model: str,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    text_encoder: str | None = None,
    vae: str | None = None,
    cache: Path | None = None,
) -> ModelSource:
    """Find a model and build its spec; reads configs and safetensors headers only.

    Args:
        model: a name of `MODEL_NAMES`, a local folder, a file with a transformer, or ``owner/name`` on the hub. A
            folder that has an alias's name is meant only when written as a path (``./flux2-dev``).
        cache_dir: the *hub's* cache folder; None is huggingface_hub's own default.
        revision: branch, tag or commit on the hub.
        offline: never touch the network (also when HF_HUB_OFFLINE is set).
        text_encoder, vae: for a single file: a folder, a name of `MODEL_NAMES` or a hub id that has them; None takes
            those of the released model of the file's shape.
        cache: our own cache folder, where a single file and its parts are linked into one folder.

    Raises:
        UsageError: parts for a model that has its own.
        CheckpointMissing: no such name, folder or repository, or not in the cache while offline.
        CheckpointAccess: the repository is gated and this user has no access (yet).
        CheckpointBroken: configs or weight files are unusable or do not belong together.
    """
    name, path = _SYNONYMS.get(model, model), Path(model).expanduser()
    if name not in MODEL_NAMES and path.is_file():
        from lowmem_flux2.planning.single_file import resolve_file  # it stands above this module

        return resolve_file(path, text_encoder, vae, cache=cache, hub_cache=cache_dir, offline=offline)
    if text_encoder is not None or vae is not None:
        raise UsageError(f"--text-encoder and --vae go with a model that is a single file; {model} has its own")
    if model == EMBEDDED:
        folder = ASSETS / EMBEDDED
        if not folder.is_dir():
            raise CheckpointMissing(
                f"the embedded model {EMBEDDED!r} is not in this installation: reinstall lowmem-flux2"
            )
        return _from_folder(folder, EMBEDDED, "embedded", EMBEDDED)
    if name in _ALIASES:
        return _from_alias(name, cache_dir, revision)
    if path.is_dir():
        return _from_folder(path, path.resolve().name, "local", model)
    if _HUB_ID.fullmatch(model) and model.count("/") == 1:
        return _from_hub(model, cache_dir, revision, offline)
    if model.startswith((".", "/", "~")) or "/" in model or "\\" in model:
        raise CheckpointMissing(f"there is no folder or file {model}")
    nearest = difflib.get_close_matches(model.lower(), (*MODEL_NAMES, *_SYNONYMS), n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(MODEL_NAMES)}."
    raise CheckpointMissing(f"there is no model {model!r}: {meant} Or give a local folder, or a hub id (owner/name)")


def check_weights(folder: Path, spec: ModelSpec) -> dict[Component, ComponentWeights]:
    """Check the headers of every component's needed weights against the spec.

    Raises:
        CheckpointMissing, CheckpointBroken: see `planning.weight_files.check_component`.
    """
    return {
        part: check_component(folder / part, spec.stored_weights(part), partial(spec.needs, part))
        for part in get_args(Component)
    }


def check_tokenizer(folder: Path, source: str, name: str = "tokenizer") -> None:
    """Check that the files of the tokenizer of that name in a folder are there and hold JSON.

    Raises:
        CheckpointMissing, CheckpointBroken: names the file.
    """
    for file in (expected.replace("tokenizer/", f"{name}/", 1) for expected in TOKENIZER_FILES):
        path = folder / file
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointMissing(f"{source}: {file} is missing: download the whole repository again") from None
        except (ValueError, OSError) as error:
            raise CheckpointBroken(f"{source}: {file} cannot be read as JSON: {error} ({path})") from error
        if not isinstance(value, dict):
            raise CheckpointBroken(f"{source}: {file} holds {type(value).__name__}, not a JSON object ({path})")


def shipped_configs(name: str) -> dict[str, Mapping[str, Any]]:
    """Return the configs that ship for an alias, as `spec_from_configs` takes them.

    Raises:
        KeyError: not an alias.
    """
    alias = _ALIASES[name]
    configs = read_configs(ASSETS / "configs" / alias.configs, name)
    return {**configs, "model_index": {**configs["model_index"], "is_distilled": alias.is_distilled}}


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


def _from_folder(folder: Path, name: str, kind: SourceKind, source: str) -> ModelSource:
    if not (folder / CONFIG_FILES["model_index"]).is_file():
        single = next(iter(sorted((*folder.glob("*.safetensors"), *folder.glob("*.gguf")))), None)
        hint = f"; if {single.name} in it is the model, give that file: -m {single}" if single else ""
        raise CheckpointMissing(f"{source} is not a diffusers folder: it has no model_index.json{hint}")
    configs = read_configs(folder, source)
    # A folder without a single weight file is a model to plan for; one with some of them is a download gone wrong.
    endings = ("*.safetensors*", "*.gguf")
    if not any(next((folder / part).glob(ending), None) for part in get_args(Component) for ending in endings):
        return ModelSource(name, kind, None, None, None, spec_from_configs(name, source, configs), folder)
    spec = spec_from_configs(name, source, configs, stored_dtype="bf16")  # until the weights tell
    spec = check_folder(folder, spec, source)
    return ModelSource(name, kind, folder, None, None, spec, folder)


def check_folder(folder: Path, spec: ModelSpec, source: str) -> ModelSpec:
    """Check that a folder has all that a run of this model needs; the spec with the dtypes that its files store.

    Raises:
        CheckpointMissing, CheckpointBroken: names the file.
    """
    check_tokenizer(folder, source)
    found = check_weights(folder, spec)
    return replace(
        as_stored(spec, found["transformer"]),
        text_stored_dtype=found["text_encoder"].stored_dtype,
        vae_stored_dtype=found["vae"].stored_dtype,
    )


def as_stored(spec: ModelSpec, held: ComponentWeights) -> ModelSpec:
    """The spec of a model whose transformer is stored like this."""
    dims = replace(spec.transformer, packed=packed_blocks(model_view(held.headers), spec.transformer))
    return replace(spec, stored_dtype=held.stored_dtype, transformer=dims)


def hub_configs(
    model: str, cache_dir: Path | None, offline: bool
) -> tuple[str, dict[str, Mapping[str, Any]], Path | None] | None:
    """Repository, configs and cached snapshot of an alias or a hub id; None where it is neither.

    Raises:
        CheckpointMissing, CheckpointAccess, CheckpointBroken: see `resolve_model`.
    """
    name = _SYNONYMS.get(model, model)
    if name in _ALIASES:
        repo_id = _ALIASES[name].repo_id
        return repo_id, shipped_configs(name), _snapshot(repo_id, cache_dir, None)
    if not (_HUB_ID.fullmatch(model) and model.count("/") == 1):
        return None
    snapshot = _snapshot(model, cache_dir, None)
    if snapshot is None or not all((snapshot / file).is_file() for file in CONFIG_FILES.values()):
        snapshot = _download_configs(model, cache_dir, None, offline)
    return model, read_configs(snapshot, model), snapshot


def _from_alias(name: str, cache_dir: Path | None, revision: str | None) -> ModelSource:
    repo_id = _ALIASES[name].repo_id
    snapshot = _snapshot(repo_id, cache_dir, revision)
    if snapshot is not None and (found := _from_snapshot(snapshot, name, repo_id, revision)) is not None:
        return found
    spec = spec_from_configs(name, name, shipped_configs(name))
    return ModelSource(name, "hub", None, repo_id, revision, spec, ASSETS / "configs" / _ALIASES[name].configs)


def _from_hub(repo_id: str, cache_dir: Path | None, revision: str | None, offline: bool) -> ModelSource:
    snapshot = _snapshot(repo_id, cache_dir, revision)
    if snapshot is None or not all((snapshot / file).is_file() for file in CONFIG_FILES.values()):
        snapshot = _download_configs(repo_id, cache_dir, revision, offline)
    found = _from_snapshot(snapshot, repo_id, repo_id, revision)
    if found is not None:
        return found
    spec = spec_from_configs(repo_id, repo_id, read_configs(snapshot, repo_id))
    return ModelSource(repo_id, "hub", None, repo_id, revision, spec, snapshot)


def _from_snapshot(snapshot: Path, name: str, repo_id: str, revision: str | None) -> ModelSource | None:
    """A cached snapshot as a source if it is complete; half a snapshot is no error: the runtime fetches the rest."""
    try:
        spec = spec_from_configs(name, repo_id, read_configs(snapshot, repo_id), stored_dtype="bf16")
        spec = check_folder(snapshot, spec, repo_id)
    except CheckpointMissing:
        return None
    return ModelSource(name, "hub", snapshot, repo_id, revision, spec, snapshot)


def _snapshot(repo_id: str, cache_dir: Path | None, revision: str | None) -> Path | None:
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


def _download_configs(repo_id: str, cache_dir: Path | None, revision: str | None, offline: bool) -> Path:
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
    unreachable = (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError)  # OfflineModeIsEnabled too
    if isinstance(error, unreachable) or type(error).__module__.split(".")[0] in _HTTP_CLIENTS:
        return CheckpointMissing(
            f"{repo_id} is not in the local hub cache and the hub cannot be reached, or must not be "
            f"({type(error).__name__}): connect once to fetch it, or {_LOCAL_HINT}"
        )
    written = isinstance(error, OSError)
    return CheckpointMissing(f"{repo_id} could not be written to the hub cache: {error}") if written else None
