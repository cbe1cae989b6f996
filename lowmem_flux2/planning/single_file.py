"""A MODEL that is one file with a transformer: which model it is, by its tensors' shapes, and the parts beside it.

The transformer's config is worked out from the header. Text encoder and VAE come from ``--text-encoder`` and ``--vae``,
folders or single files too, or from the released model of that shape; so does the tokenizer of a text encoder that is
a file, unless it lies beside it or ``--tokenizer`` says otherwise. All of it is then linked into one folder in
diffusers' form in the cache, which everything else reads like any other folder; nothing is copied.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing, UsageError
from lowmem_flux2.folders import cache_folder
from lowmem_flux2.planning import sources
from lowmem_flux2.planning.configs import (
    CONFIG_FILES,
    KLEIN_KV,
    OWN_CONFIG,
    OWN_CONFIG_FILE,
    read_configs,
    spec_from_configs,
)
from lowmem_flux2.planning.gguf_header import is_gguf
from lowmem_flux2.planning.headers import FileHeader
from lowmem_flux2.planning.models import Component, ModelSpec
from lowmem_flux2.planning.part_file import text_encoder_config, vae_config
from lowmem_flux2.planning.sources import Missing, ModelSource, SingleFile, SinglePart
from lowmem_flux2.planning.stored import StoredTensor, model_view
from lowmem_flux2.planning.weight_files import check_component, check_headers, weight_header

_FLAGS: Final = {"text_encoder": "--text-encoder", "vae": "--vae", "tokenizer": "--tokenizer"}
_SHAPES: Final = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")
"""Released models of different shapes; their parts go with a file of that shape."""
_INDEX: Final = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.")
_TOKENIZER: Final = "tokenizer.json"
_OTHERS: Final[Mapping[str, str]] = {
    "lora": "a LoRA, not a model: give it beside one",
    "model.layers.": "a text encoder: give it with --text-encoder, beside the transformer with -m",
    "encoder.down": "a VAE: give it with --vae, beside the transformer with -m",
    "decoder.up": "a VAE: give it with --vae, beside the transformer with -m",
}


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a text encoder, a VAE or a tokenizer comes from.

    Attributes:
        place: its folder, or the file that it is; None where it is still on the hub.
        configs: of all parts that are where this one is.
        tokenizer: the folder that goes with a text encoder; None where that is a file alone.
        header: of a file.
    """

    place: Path | None
    configs: Mapping[str, Mapping[str, Any]]
    tokenizer: Path | None = None
    repo_id: str = ""
    header: FileHeader | None = None


def resolve_file(
    file: Path,
    text_encoder: str | None,
    vae: str | None,
    tokenizer: str | None,
    *,
    cache: Path | None = None,
    hub_cache: Path | None = None,
    offline: bool = False,
) -> ModelSource:
    """The source of a single file and its parts; its folder is None where parts are still to be fetched.

    Raises:
        UsageError: a file of no released shape without parts; a cache that cannot be written.
        CheckpointMissing, CheckpointBroken: no FLUX.2 transformer in the file, or parts that do not go with it; says
            what was found.
    """
    header = weight_header(file)
    view = model_view([header])
    config = transformer_config(file, view)
    known = _released(config)
    given = {"text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
    text_encoder = text_encoder or known
    if text_encoder is None or (vae is None and known is None and not _holds(text_encoder, "vae")):
        raise UsageError(
            f"{file} is a FLUX.2 transformer of {config['num_layers']} double-stream and {config['num_single_layers']} "
            f"single-stream blocks, {config['num_attention_heads']} heads wide, which no released model is: give both "
            "--text-encoder and --vae"
        )
    vae = vae or (text_encoder if _holds(text_encoder, "vae") or known is None else known)
    source = " ".join([str(file), *(f"{_FLAGS[key]} {value}" for key, value in given.items() if value)])
    encoder = _part(text_encoder, "text_encoder", hub_cache, offline)
    found: dict[SinglePart, _Part] = {
        "text_encoder": encoder,
        "vae": _part(vae, "vae", hub_cache, offline),
        "tokenizer": _tokenizer(tokenizer, text_encoder, encoder, known, hub_cache, offline),
    }
    configs = _configs(config, found)
    name = file.resolve().stem
    spec = spec_from_configs(name, source, configs, stored_dtype="bf16")  # until the weights tell
    held = check_headers(file, (header,), spec.stored_weights("transformer"))
    spec = sources.as_stored(spec, held)
    found = {key: _checked(key, part, spec, source) for key, part in found.items()}
    missing = tuple(Missing(part.repo_id, key) for key, part in found.items() if part.place is None)
    if missing and missing[0].part == "text_encoder":  # which is fetched with its tokenizer
        missing = tuple(each for each in missing if (each.repo_id, each.part) != (missing[0].repo_id, "tokenizer"))
    single = SingleFile(file, text_encoder, vae, tokenizer, cache, missing)
    if missing:
        shipped = sources.ASSETS / "configs" / (known or _SHAPES[0])
        return ModelSource(name, "local", None, None, None, spec, shipped, single)
    folder = _assembled(file, configs, found, cache_folder(cache))
    spec = replace(sources.check_folder(folder, spec, source), stored_dtype=spec.stored_dtype)
    return ModelSource(name, "local", folder, None, None, spec, folder, single)


def transformer_config(file: Path, view: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The transformer's config in diffusers' form, worked out from the shapes of its tensors.

    Raises:
        CheckpointBroken: no FLUX.2 transformer; says what was found.
    """

    def shape(name: str) -> tuple[int, ...]:
        found = view.get(name)
        if found is None or len(found.shape) not in (1, 2):
            raise CheckpointBroken(_not_a_transformer(file, view, name))
        return found.shape

    width, in_channels = shape("x_embedder.weight")
    counts = {"transformer_blocks": 0, "single_transformer_blocks": 0}
    for name in view:
        if block := _INDEX.match(name):
            counts[block[1]] = max(counts[block[1]], int(block[2]) + 1)
    (head_dim,) = shape("single_transformer_blocks.0.attn.norm_q.weight")
    shipped = sources.shipped_configs(_SHAPES[0])["transformer"]
    axes = shipped["axes_dims_rope"]
    config = {
        "num_layers": counts["transformer_blocks"],
        "num_single_layers": counts["single_transformer_blocks"],
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight")[0],
        "joint_attention_dim": shape("context_embedder.weight")[1],
        "mlp_ratio": shape("single_transformer_blocks.0.attn.to_out.weight")[1] / width - 1,
        "timestep_guidance_channels": shape("time_guidance_embed.timestep_embedder.linear_1.weight")[1],
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in view,
        # Four axes of equal parts in every release; the weights do not tell.
        "axes_dims_rope": axes if sum(axes) == head_dim else [head_dim // 4] * 4,
    }
    return {**shipped, **config}


def _not_a_transformer(file: Path, view: Mapping[str, StoredTensor], missing: str) -> str:
    for mark, what in _OTHERS.items():
        if any(mark in name for name in view):
            return f"{file} is {what}"
    names = ", ".join(sorted(view)[:3]) or "nothing"
    return f"{file} holds no FLUX.2 transformer: no {missing!r} in any layout that is known here; it has {names}, ..."


def _released(config: Mapping[str, Any]) -> str | None:
    """The released model of this shape."""
    keys = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "guidance_embeds")
    for name in _SHAPES:
        shipped = sources.shipped_configs(name)["transformer"]
        if all(shipped[key] == config[key] for key in keys):
            return name
    return None


def _holds(argument: str, component: Component) -> bool:
    """Whether a local folder, or the embedded model, has this part too."""
    folder = sources.ASSETS / argument if argument == sources.EMBEDDED else Path(argument).expanduser()
    return (folder / component).is_dir()


def _part(argument: str, component: Literal["text_encoder", "vae"], hub_cache: Path | None, offline: bool) -> _Part:
    """A part from a file, a folder in diffusers' form, a folder of its own, or the hub."""
    folder = _local(argument)
    if folder.is_file():
        return _file_part(folder, component)
    if not folder.is_dir():
        return _hub_part(argument, component, hub_cache, offline)
    if (folder / component / "config.json").is_file():
        return _Part(folder / component, read_configs(folder, argument), folder / "tokenizer")
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointMissing(
            f"{_FLAGS[component]} {argument}: neither a {component}/config.json nor a config.json is in there"
        )
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointBroken(f"{config} cannot be read as JSON: {error}") from error
    tokenizer = folder if (folder / _TOKENIZER).is_file() else folder.resolve().parent / "tokenizer"
    return _Part(folder, {component: values}, tokenizer)


def _file_part(file: Path, component: Component) -> _Part:
    """A text encoder or a VAE that is one file."""
    header = weight_header(file)
    view = model_view([header])
    if component == "vae":
        return _Part(file, {component: vae_config(file, view)}, header=header)
    beside = file.parent if (file.parent / _TOKENIZER).is_file() else None
    return _Part(file, {component: text_encoder_config(file, view, header.metadata)}, beside, header=header)


def _tokenizer(
    argument: str | None, of: str, encoder: _Part, known: str | None, hub_cache: Path | None, offline: bool
) -> _Part:
    """The tokenizer that is asked for, else that of the text encoder, else the released model's."""
    if argument is None and encoder.header is None:
        return replace(encoder, place=encoder.tokenizer)
    if argument is None and encoder.tokenizer is not None:
        return _Part(encoder.tokenizer, {})
    argument = argument or known
    if argument is None:
        raise UsageError(
            f"--text-encoder {of} is a file without a tokenizer beside it, for a transformer that no released model "
            "has: give a folder, a name or a hub id with --tokenizer"
        )
    folder = _local(argument)
    if folder.is_file():
        raise UsageError(f"--tokenizer {argument} is a file: give the folder that it is in")
    if not folder.is_dir():
        return _hub_part(argument, "tokenizer", hub_cache, offline)
    own = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    return _Part(own, read_configs(folder, argument))


def _local(argument: str) -> Path:
    return sources.ASSETS / argument if argument == sources.EMBEDDED else Path(argument).expanduser()


def _hub_part(argument: str, part: SinglePart, hub_cache: Path | None, offline: bool) -> _Part:
    is_file = Path(argument).suffix.lower() in sources.WEIGHTS
    found = None if is_file else sources.hub_configs(argument, hub_cache, offline)
    if found is None:
        raise CheckpointMissing(
            f"{_FLAGS[part]} {argument}: there is no such folder or file, and it is neither a hub id nor one of "
            f"{', '.join(sources.MODEL_NAMES)}"
        )
    repo_id, configs, snapshot = found
    if snapshot is None:
        return _Part(None, configs, repo_id=repo_id)
    return _Part(snapshot / part, configs, snapshot / "tokenizer", repo_id)


def _configs(config: Mapping[str, Any], parts: Mapping[SinglePart, _Part]) -> dict[str, Mapping[str, Any]]:
    """As `spec_from_configs` takes them, and as they are written."""
    shipped = sources.shipped_configs("flux2-dev" if config["guidance_embeds"] else "flux2-klein-4b")
    text_encoder = parts["text_encoder"].configs
    about = text_encoder if parts["text_encoder"].header is None else parts["tokenizer"].configs
    index = dict(shipped["model_index"])
    if not config["guidance_embeds"]:  # weights of a base model and of a KV model look like their sibling's
        told = about.get("model_index", {})
        index["is_distilled"] = told.get("is_distilled", True)
        index["_class_name"] = told["_class_name"] if told.get("_class_name") == KLEIN_KV else index["_class_name"]
    configs = {
        "model_index": index,
        "transformer": config,
        "text_encoder": text_encoder["text_encoder"],
        "vae": parts["vae"].configs["vae"],
        "scheduler": about.get("scheduler", shipped["scheduler"]),
    }
    own = about.get(OWN_CONFIG)
    return configs if own is None else {**configs, OWN_CONFIG: own}


def _checked(key: SinglePart, part: _Part, spec: ModelSpec, source: str) -> _Part:
    """The part, without its folder where that is a snapshot of the hub's which lacks weights."""
    if part.place is None:
        return part
    try:
        if key == "tokenizer":
            sources.check_tokenizer(part.place.parent, source, spec.text_encoder.architecture, part.place.name)
        elif part.header is not None:
            check_headers(part.place, (part.header,), spec.stored_weights(key), partial(spec.needs, key))
        else:
            check_component(part.place, spec.stored_weights(key), partial(spec.needs, key))
    except CheckpointMissing:
        if not part.repo_id:
            raise
        return replace(part, place=None)
    return part


def _assembled(
    file: Path, configs: Mapping[str, Mapping[str, Any]], parts: Mapping[SinglePart, _Part], cache: Path
) -> Path:
    """The folder of links and configs for these parts; one that is there already is the same."""
    links = {f"transformer/{_file_name('transformer', file)}": file}
    written = set(configs)
    for key, part in parts.items():
        assert part.place is not None
        links[f"{key}/{_file_name(key, part.place)}" if part.header else key] = part.place
        if part.header is None:
            written.discard(key)
    texts = {
        CONFIG_FILES.get(key, OWN_CONFIG_FILE): json.dumps(configs[key], indent=2, sort_keys=True) + "\n"
        for key in written
    }
    targets = {name: str(target.resolve()) for name, target in links.items()}
    digest = hashlib.sha256(json.dumps([targets, texts], sort_keys=True).encode()).hexdigest()[:12]
    final = cache / "assembled" / f"{file.resolve().stem}-{digest}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=final.parent, prefix="."))
        try:
            for name, text in texts.items():
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).write_text(text, encoding="utf-8")
            for name, target in targets.items():
                (made / name).parent.mkdir(exist_ok=True)
                (made / name).symlink_to(target, target_is_directory=Path(target).is_dir())
            made.chmod(0o755)
            made.rename(final)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            if not final.is_dir():  # else another process was first
                raise
    except OSError as error:
        raise UsageError(
            f"{final.parent} cannot be written: {error}; give another folder with --cache-dir or LOWMEM_FLUX2_CACHE"
        ) from error
    return final


def _file_name(component: str, file: Path) -> str:
    """What a component's file is called in its folder."""
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    return f"{stem}.gguf" if is_gguf(file) else f"{stem}.safetensors"
