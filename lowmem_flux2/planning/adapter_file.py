"""A LoRA's safetensors file: which of its keys means which Linear, and by what it is scaled. Reads its header, never
its factors."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.adapters import Adapter, Lora
from lowmem_flux2.planning.headers import FileHeader, read_header
from lowmem_flux2.planning.layouts import Rows
from lowmem_flux2.planning.linears import StoredWeight, is_conditioning, stored_weights
from lowmem_flux2.planning.models import ModelSpec

SAMPLES, SAMPLE_BYTES = 16, 4096
"""Pieces of the file that go into the fingerprint, beside its header."""
SHOWN_KEYS = 6
DTYPES = ("F64", "F32", "F16", "BF16")
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
FORMS = (
    "transformer.transformer_blocks.N.attn.to_q.lora_A.weight (diffusers, PEFT), "
    "diffusion_model.double_blocks.N.img_attn.qkv.lora_A.weight (BFL, ComfyUI, ai-toolkit), "
    "lora_unet_double_blocks_N_img_attn_qkv.lora_down.weight (kohya)"
)

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A(?:\.default)?\.weight|lora_down\.weight|lora\.down\.weight)"
    r"|(?P<up>lora_B(?:\.default)?\.weight|lora_up\.weight|lora\.up\.weight)|(?P<alpha>alpha))"
)
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|lora_magnitude_vector"),
    "LoKr": re.compile(r"\.lokr_"),
    "LoHa": re.compile(r"\.hada_"),
    "OFT": re.compile(r"\.oft_"),
}
_TEXT_ENCODER = re.compile(
    r"^(?:text_encoder|text_model|te\d?[._]|lora_te|cond_stage_model|conditioner)|\.text_encoder\."
)
_FLUX_1 = re.compile(
    r"norm1(?:_context)?[._]linear|[._]proj_mlp|[._]ff(?:_context)?[._]net[._]|(?:img|txt)_mod[._]lin"
    r"|single_blocks[._]\d+[._]modulation[._]lin|single_transformer_blocks[._]\d+[._]attn[._]to_[qkv][._]"
)
_ALPHA_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}
_METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers' ``save_lora_weights`` keeps PEFT's config."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The two factors that one Linear gets from a file.

    Args:
        linear: diffusers' name.
        down, up: keys of A (rank, columns) and of B, of which ``rows`` are this Linear's.
        factor: alpha / rank, the scale apart.
    """

    linear: str
    down: str
    up: str
    stored_rows: int
    rows: Rows
    columns: int
    rank: int
    factor: float

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.rows)

    @property
    def values(self) -> int:
        return self.rank * (self.columns + self.num_rows)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA's file, its keys understood: what it adds to which Linear, and keys that name nothing in this model."""

    lora: Lora
    header: FileHeader
    low_ranks: tuple[LowRank, ...]
    unmatched: tuple[str, ...]

    @property
    def adapter(self) -> Adapter:
        once = [each.values for each in self.low_ranks if is_conditioning(each.linear)]
        return Adapter(
            path=self.lora.path,
            scale=self.lora.scale,
            fingerprint=_fingerprint(self.header),
            values=sum(each.values for each in self.low_ranks) - sum(once),
            once_values=sum(once),
            tensors=2 * len(self.low_ranks),
            rank=max(each.rank for each in self.low_ranks),
            matched=len(self.header.tensors) - len(self.unmatched),
            unmatched=len(self.unmatched),
        )

    @property
    def warning(self) -> str | None:
        """Which keys are left out, in one line."""
        if not self.unmatched:
            return None
        counts = f"{len(self.unmatched)} of {len(self.header.tensors)} keys"
        return f"LoRA {self.lora.path}: {counts} name nothing in this model and are left out: {_some(self.unmatched)}"


def adapters_of(loras: Sequence[Lora], model: ModelSpec) -> tuple[Adapter, ...]:
    """What a request's LoRAs are and cost; those of scale 0 are checked and left out.

    Raises:
        CheckpointMissing, CheckpointBroken: see ``read_adapter``.
    """
    found = [read_adapter(lora, model) for lora in loras]
    return tuple(each.adapter for each in found if each.lora.scale)


def read_adapter(lora: Lora, model: ModelSpec) -> AdapterFile:
    """Read a LoRA's header and find the Linear that each key means.

    Raises:
        CheckpointMissing: no such file.
        CheckpointBroken: not safetensors; no key means a Linear of this model; another kind of adapter, one for a text
            encoder or for another model; a factor without its other half.
    """
    path = Path(lora.path)
    header = read_header(path)
    for name, info in header.tensors.items():
        _refuse_other_kinds(path, name)
        if "lora" in name and info.dtype not in DTYPES:
            raise CheckpointBroken(f"LoRA {path}: {name} is stored as {info.dtype}: only {', '.join(DTYPES)} are read")
    scaling = _Scaling(path, header)
    low_ranks, unmatched = _match(path, header, stored_weights(model.transformer), scaling, model.name)
    if not low_ranks:
        raise CheckpointBroken(
            f"LoRA {path}: none of its {len(header.tensors)} keys means a Linear of {model.name}. Looked for {FORMS}; "
            f"found {_some(tuple(header.tensors)) or 'no tensors'}"
        )
    return AdapterFile(lora, header, tuple(low_ranks), tuple(unmatched))


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


def _refuse_other_kinds(path: Path, name: str) -> None:
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.search(name):
            raise CheckpointBroken(f"LoRA {path}: it is a {kind} ({name}): only plain LoRA is applied here")
    if _TEXT_ENCODER.search(name):
        raise CheckpointBroken(
            f"LoRA {path}: it has keys for a text encoder ({name}): here a LoRA is applied to the transformer alone, "
            "and half of it would be another picture. Take a file without them"
        )
    if _FLUX_1.search(name):
        raise CheckpointBroken(f"LoRA {path}: it is made for FLUX.1 ({name}), whose blocks are built otherwise")


def _match(
    path: Path,
    header: FileHeader,
    known: Mapping[str, StoredWeight],
    scaling: _Scaling,
    model: str,
) -> tuple[list[LowRank], list[str]]:
    keys: dict[str, dict[str, str]] = {}
    unmatched = []
    underscored = {prefix + name.replace(".", "_"): name for prefix in UNDERSCORED for name in known}
    for key in header.tensors:
        found = _KEY.fullmatch(key)
        name = _module(found["module"]) if found else ""
        name = underscored.get(name, name)
        if found is None or name not in known:
            unmatched.append(key)
            continue
        assert found.lastgroup is not None
        keys.setdefault(found["module"], {"name": name})[found.lastgroup] = key
    low_ranks = []
    for module, own in keys.items():
        if "down" not in own or "up" not in own:
            raise CheckpointBroken(f"LoRA {path}: {module} has only one of its two factors (lora_A and lora_B)")
        low_ranks += _pair(path, header, own, known[own["name"]], scaling, model)
    return low_ranks, unmatched


def _module(text: str) -> str:
    """A module's name without what trainers put before it."""
    while prefix := next((prefix for prefix in PREFIXES if text.startswith(prefix)), None):
        text = text.removeprefix(prefix)
    return "tran" + text if text.startswith("sformer_blocks.") else text  # of some exports; diffusers takes it too


def _pair(
    path: Path, header: FileHeader, own: Mapping[str, str], stored: StoredWeight, scaling: _Scaling, model: str
) -> list[LowRank]:
    down, up = header.tensors[own["down"]].shape, header.tensors[own["up"]].shape
    rank = down[0] if down else 0
    if down != (rank, stored.columns) or up != (stored.rows, rank) or not rank:
        raise CheckpointBroken(
            f"LoRA {path}: {own['down']} has the shape {list(down)}, {own['up']} {list(up)}; in {model} that Linear "
            f"has {stored.columns} inputs and {stored.rows} outputs: the file is made for another model"
        )
    return [
        LowRank(
            linear=part.linear,
            down=own["down"],
            up=own["up"],
            stored_rows=stored.rows,
            rows=part.rows,
            columns=stored.columns,
            rank=rank,
            factor=scaling.of(own.get("alpha"), part.linear, rank),
        )
        for part in stored.parts
    ]


class _Scaling:
    """alpha / rank of each module: from its ``alpha`` tensor, else from PEFT's config in the metadata, else 1."""

    def __init__(self, path: Path, header: FileHeader) -> None:
        self._path = path
        self._header = header
        self._config = _peft_config(path, header)

    def of(self, alpha_key: str | None, linear: str, rank: int) -> float:
        if alpha_key is not None:
            return self._scalar(alpha_key) / rank
        config = self._config
        alpha = config.get("lora_alpha")
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", linear):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _scalar(self, key: str) -> float:
        info = self._header.tensors[key]
        with self._path.open("rb") as file:
            file.seek(self._header.data_begin + info.begin)
            raw = file.read(info.num_bytes)
        if info.num_values == 1 and info.dtype == "BF16":
            raw, kind = b"\0\0" + raw, "<f"
        elif info.num_values == 1 and info.dtype in _ALPHA_FORMATS:
            kind = _ALPHA_FORMATS[info.dtype]
        else:
            raise CheckpointBroken(f"LoRA {self._path}: {key} is {info.dtype} {list(info.shape)}, not one number")
        return float(struct.unpack(kind, raw)[0])


def _peft_config(path: Path, header: FileHeader) -> dict[str, Any]:
    """PEFT's LoraConfig of the transformer, as diffusers packs it; empty where there is none.

    Raises:
        CheckpointBroken: unreadable, or a kind that is not plain LoRA.
    """
    with path.open("rb") as file:
        file.seek(8)
        text = json.loads(file.read(header.data_begin - 8)).get("__metadata__", {}).get(_METADATA_KEY)
    if text is None:
        return {}
    try:
        packed = json.loads(text)
        config = {key.removeprefix("transformer."): value for key, value in packed.items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointBroken(f"LoRA {path}: its {_METADATA_KEY} is not readable: {error}") from error
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise CheckpointBroken(f"LoRA {path}: it was made with {key}: only plain LoRA is applied here")
    return config


def _fingerprint(header: FileHeader) -> str:
    """12 hex digits over the header and ``SAMPLES`` pieces of the values, evenly spread."""
    last = max(0, header.file_bytes - header.data_begin - SAMPLE_BYTES)
    with header.path.open("rb") as file:
        digest = hashlib.sha256(file.read(header.data_begin))
        for index in range(SAMPLES):
            file.seek(header.data_begin + last * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]
