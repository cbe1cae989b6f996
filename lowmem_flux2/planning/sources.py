"""Where a MODEL argument points: an alias, a local diffusers folder, a single file, or a hub id.

Aliases are planned from configs that ship with the package, so that ``lowmem-flux2 plan -m flux2-dev`` needs neither a
download nor a licence. A hub id that is not in the local cache costs the download of its config files, a few KiB;
weights are the runtime's to fetch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, get_args

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing, UsageError
from lowmem_flux2.planning.configs import CONFIG_FILES, read_configs, spec_from_configs
from lowmem_flux2.planning.hub import cached_snapshot, download_configs
from lowmem_flux2.planning.models import Architecture, Component, ModelSpec
from lowmem_flux2.planning.stored import model_view, packed_blocks, packed_layers
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
    pipeline: str = ""
    """Where it is not that of the configs."""


_ALIASES: Final[Mapping[str, _Alias]] = {
    "flux2-dev": _Alias("black-forest-labs/FLUX.2-dev", "flux2-dev"),
    "flux2-klein-4b": _Alias("black-forest-labs/FLUX.2-klein-4B", "flux2-klein-4b", is_distilled=True),
    "flux2-klein-9b": _Alias("black-forest-labs/FLUX.2-klein-9B", "flux2-klein-9b", is_distilled=True),
    "flux2-klein-9b-kv": _Alias(
        "black-forest-labs/FLUX.2-klein-9b-kv", "flux2-klein-9b", is_distilled=True, pipeline="Flux2KleinKVPipeline"
    ),
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

_MARKS: Final[Mapping[Architecture, str]] = {"qwen3": "<|im_start|>", "mistral3": "[INST]"}
"""A token of each text encoder's own: another's ids would be read as words that nobody wrote."""
WEIGHTS: Final = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
"""What a MODEL that is meant as a file ends with."""
_HUB_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]*\w")


SinglePart = Literal["text_encoder", "vae", "tokenizer"]
"""What goes with a transformer's file."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A part of a single-file model that is still to be fetched from the hub."""

    repo_id: str
    part: SinglePart


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
    tokenizer: str | None
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


def check_revision(source: ModelSource, asked: str | None) -> None:
    """Raises UsageError: a revision of what is not on the hub."""
    if asked is not None and source.kind != "hub":
        raise UsageError(f"--revision {asked}: {source.name} is not on the hub; leave it out")


def resolve_model(
    model: str,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    text_encoder: str | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    cache: Path | None = None,
) -> ModelSource:
    """Find a model and build its spec; reads configs and safetensors headers only.

    Args:
        model: a name of `MODEL_NAMES`, a local folder, a file with a transformer, or ``owner/name`` on the hub. A
            folder that has an alias's name is meant only when written as a path (``./flux2-dev``).
        cache_dir: the *hub's* cache folder; None is huggingface_hub's own default.
        revision: branch, tag or commit on the hub.
        offline: never touch the network (also when HF_HUB_OFFLINE is set).
        text_encoder, vae: for a single file: a file, a folder, a name of `MODEL_NAMES` or a hub id that has them; None
            takes those of the released model of the file's shape.
        tokenizer: for a single file whose text encoder is one too: a folder, name or hub id; None takes the one beside
            that file, else that of the released model.
        cache: our own cache folder, where a single file and its parts are linked into one folder.

    Raises:
        UsageError: parts for a model that has its own, or no name at all.
        CheckpointMissing: no such name, folder or repository, or not in the cache while offline.
        CheckpointAccess: the repository is gated and this user has no access (yet).
        CheckpointBroken: configs or weight files are unusable or do not belong together.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise UsageError(f"model: give a name, a folder, a file or a hub id, not {model!r}")
    name, path = _SYNONYMS.get(model, model), Path(model).expanduser()
    if name not in MODEL_NAMES and path.is_file():
        from lowmem_flux2.planning.single_file import resolve_file  # it stands above this module

        return resolve_file(path, text_encoder, vae, tokenizer, cache=cache, hub_cache=cache_dir, offline=offline)
    if name not in MODEL_NAMES and not path.is_dir() and path.suffix.lower() in WEIGHTS:
        link = f": it is a link to {path.readlink()}, which is not there" if path.is_symlink() else ""
        raise CheckpointMissing(f"there is no file {model}{link}")
    if any(part is not None for part in (text_encoder, vae, tokenizer)):
        raise UsageError(
            f"--text-encoder, --vae and --tokenizer go with a model that is a single file; {model} has its own"
        )
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


def check_tokenizer(folder: Path, source: str, architecture: Architecture, name: str = "tokenizer") -> None:
    """Check that a tokenizer's files, in a folder of that name, are there, hold JSON, and are of this text encoder.

    Raises:
        CheckpointMissing, CheckpointBroken: names the file.
    """
    for file in (expected.replace("tokenizer/", f"{name}/", 1) for expected in TOKENIZER_FILES):
        path = folder / file
        try:
            text = path.read_text(encoding="utf-8")
            value = json.loads(text)
        except FileNotFoundError:
            raise CheckpointMissing(f"{source}: {file} is missing: download the whole repository again") from None
        except (ValueError, OSError) as error:
            raise CheckpointBroken(f"{source}: {file} cannot be read as JSON: {error} ({path})") from error
        if not isinstance(value, dict):
            raise CheckpointBroken(f"{source}: {file} holds {type(value).__name__}, not a JSON object ({path})")
        if file == TOKENIZER_FILES[0].replace("tokenizer/", f"{name}/", 1) and f'"{_MARKS[architecture]}"' not in text:
            raise CheckpointBroken(
                f"{source}: {file} is of another text encoder: it has no {_MARKS[architecture]!r}, as that of "
                f"{architecture} has ({path})"
            )


def shipped_configs(name: str) -> dict[str, Mapping[str, Any]]:
    """Return the configs that ship for an alias, as `spec_from_configs` takes them.

    Raises:
        KeyError: not an alias.
    """
    alias = _ALIASES[name]
    configs = read_configs(ASSETS / "configs" / alias.configs, name)
    index = {**configs["model_index"], "is_distilled": alias.is_distilled}
    return {**configs, "model_index": index | ({"_class_name": alias.pipeline} if alias.pipeline else {})}


def _from_folder(folder: Path, name: str, kind: SourceKind, source: str) -> ModelSource:
    if not (folder / CONFIG_FILES["model_index"]).is_file():
        if (folder.resolve().parent / CONFIG_FILES["model_index"]).is_file():
            raise CheckpointMissing(f"{source} is a part of a model: give the folder that it is in: -m {folder.parent}")
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
    check_tokenizer(folder, source, spec.text_encoder.architecture)
    found = check_weights(folder, spec)
    text = found["text_encoder"]
    return replace(
        as_stored(spec, found["transformer"]),
        text_encoder=replace(spec.text_encoder, packed=packed_layers(model_view(text.headers), spec.text_encoder)),
        text_stored_dtype=text.stored_dtype,
        text_files=text.sizes,
        vae_stored_dtype=found["vae"].stored_dtype,
    )


def as_stored(spec: ModelSpec, held: ComponentWeights) -> ModelSpec:
    """The spec of a model whose transformer is stored like this."""
    dims = replace(spec.transformer, packed=packed_blocks(model_view(held.headers), spec.transformer))
    return replace(spec, stored_dtype=held.stored_dtype, transformer=dims, transformer_files=held.sizes)


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
        return repo_id, shipped_configs(name), cached_snapshot(repo_id, cache_dir, None)
    if not (_HUB_ID.fullmatch(model) and model.count("/") == 1):
        return None
    snapshot = cached_snapshot(model, cache_dir, None)
    if snapshot is None or not all((snapshot / file).is_file() for file in CONFIG_FILES.values()):
        snapshot = download_configs(model, cache_dir, None, offline)
    return model, read_configs(snapshot, model), snapshot


def _from_alias(name: str, cache_dir: Path | None, revision: str | None) -> ModelSource:
    repo_id = _ALIASES[name].repo_id
    snapshot = cached_snapshot(repo_id, cache_dir, revision)
    if snapshot is not None and (found := _from_snapshot(snapshot, name, repo_id, revision)) is not None:
        return found
    spec = spec_from_configs(name, name, shipped_configs(name))
    return ModelSource(name, "hub", None, repo_id, revision, spec, ASSETS / "configs" / _ALIASES[name].configs)


def _from_hub(repo_id: str, cache_dir: Path | None, revision: str | None, offline: bool) -> ModelSource:
    snapshot = cached_snapshot(repo_id, cache_dir, revision)
    if snapshot is None or not all((snapshot / file).is_file() for file in CONFIG_FILES.values()):
        snapshot = download_configs(repo_id, cache_dir, revision, offline)
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
