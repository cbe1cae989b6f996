"""A component's tensors as the model names them, however its files store them: names, rows, scales, quantized blocks.

Recognised by what the headers say, never by a file's name. Reading the values is `runtime.checkpoint`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from math import prod
from types import MappingProxyType
from typing import Any, Final, Literal

from lowmem_flux2.errors import CheckpointBroken, UsageError
from lowmem_flux2.planning import encoder_layouts, sdnq, vae_layouts
from lowmem_flux2.planning.gguf_header import BLOCKS, INTERLEAVED, head_dim_of
from lowmem_flux2.planning.headers import FileHeader, TensorInfo
from lowmem_flux2.planning.layouts import PREFIXES, Rows, is_bfl, model_tensors
from lowmem_flux2.planning.linears import DOUBLE_LINEARS, SINGLE_LINEARS
from lowmem_flux2.planning.models import TextEncoderSpec, TransformerSpec

Encoding = Literal["plain", "scaled", "gguf", "bnb4", "sdnq"]
FP8: Final = ("F8_E4M3", "F8_E5M2")
_WEIGHT: Final = ".weight"
_SCALES: Final = (".weight_scale", ".scale_weight")
"""After a Linear's name: BFL's, ModelOpt's and ComfyUI's name, and ComfyUI's older one."""
_IGNORED: Final = (".input_scale", ".scale_input", ".comfy_quant")
"""Beside an fp8 weight, and of no use where activations are not quantized."""
_MARKERS: Final = ("scaled_fp8",)
_NVFP4: Final = ".weight_scale_2"
_BNB_STATE: Final = ".weight.quant_state.bitsandbytes__"
_BNB_AIDS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, slots=True)
class Place:
    """One stored tensor."""

    header: FileHeader
    name: str
    info: TensorInfo

    @property
    def offset(self) -> int:
        """Of its first byte in the file."""
        return self.header.data_begin + self.info.begin


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the model.

    Attributes:
        shape: the model's.
        encoding: ``plain``: values of the stored dtype; ``scaled``: fp8 times a scale for the tensor or for each row;
            ``gguf``: blocks of the dtype; ``bnb4``: bitsandbytes' 4-bit blocks over all of the tensor; ``sdnq``: as
            SDNQ's config says.
        place: the tensor that holds it, and maybe others.
        rows: which of the stored rows are its own; all in their order where it is the only one.
        stride: each range of rows takes every so manieth stored row.
        aids: what else decodes it: ``scale``; or ``absmax``, ``quant_map`` and so on.
        state: bitsandbytes' quantization state; SDNQ's settings, and whether it is ``transposed``.
    """

    shape: tuple[int, ...]
    encoding: Encoding
    place: Place
    rows: Rows
    aids: Mapping[str, Place] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    stride: int = 1

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Its share of the stored tensor's bytes, and of what decodes it."""
        held = self.place.info.num_bytes + sum(aid.info.num_bytes for aid in self.aids.values())
        stored = self.place.info.num_values if self.encoding not in ("bnb4", "sdnq") else self.num_values
        return held * self.num_values // max(1, stored)

    @property
    def row_values(self) -> int:
        """Values of one row; a vector's rows have one."""
        return prod(self.shape[1:])

    @property
    def is_weight(self) -> bool:
        """Whether it holds floating-point values."""
        return self.encoding != "plain" or "F" in self.place.info.dtype


def model_view(headers: Iterable[FileHeader]) -> Mapping[str, StoredTensor]:
    """Every tensor that the files hold of the model, under diffusers' and transformers' names.

    Raises:
        CheckpointBroken: fp8 without scales, or a quantization that is not read here; says what was found.
    """
    stored = {name: Place(header, name, info) for header in headers for name, info in header.tensors.items()}
    places, targets = _layout(stored)
    found: dict[str, StoredTensor] = {}
    for name, place in places.items():
        if _is_aid(name, places):
            continue
        tensor = _decoded(name, place, places)
        for target, own in targets(name, tensor):
            if target in found:
                raise CheckpointBroken(f"{place.header.path}: two of its tensors are {target!r} of the model")
            found[target] = own
    return MappingProxyType(found)


_Targets = Callable[[str, StoredTensor], Iterable[tuple[str, StoredTensor]]]
"""A stored tensor, and its name without prefix, to the model's tensors in it, by their names."""


def _layout(stored: Mapping[str, Place]) -> tuple[Mapping[str, Place], _Targets]:
    """The tensors that count, by their names without prefix, and how they become the model's.

    A file with all of ComfyUI's parts holds others beside a transformer.
    """
    for prefixes, recognizes, targets_of in (
        (PREFIXES, is_bfl, lambda places: _from_bfl),
        (vae_layouts.PREFIXES, vae_layouts.is_bfl_vae, _from_bfl_vae),
        ((), encoder_layouts.is_llama_cpp, lambda places: _from_llama_cpp),
    ):
        prefixed = {
            name.removeprefix(prefix): place
            for prefix in prefixes
            for name, place in stored.items()
            if name.startswith(prefix)
        }
        for places in (prefixed, stored):
            if recognizes(places):
                return places, targets_of(places)
    return stored, lambda name, tensor: ((name, tensor),)


def _none_of(tensor: StoredTensor, what: str) -> CheckpointBroken:
    return CheckpointBroken(f"{tensor.place.header.path}: its tensor {tensor.place.name!r} is none of {what}")


def _from_bfl(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    targets = tuple(model_tensors(name, tensor.rows[0][1]))
    if not targets:
        other = " (a FLUX.1 model, it seems)" if "_mod." in name or name.startswith("vector_in.") else ""
        raise _none_of(tensor, f"FLUX.2's{other}")
    for target, rows in targets:
        yield target, replace(tensor, shape=(sum(count for _, count in rows), *tensor.shape[1:]), rows=rows)


def _from_bfl_vae(places: Mapping[str, Place]) -> _Targets:
    levels = vae_layouts.num_levels(places)

    def targets(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
        target = vae_layouts.vae_tensor(name, levels)
        if target is None:
            raise _none_of(tensor, "a FLUX.2 VAE's")
        is_matrix = ".attentions." in target and tensor.shape[2:] == (1, 1)
        yield target, replace(tensor, shape=tensor.shape[:2]) if is_matrix else tensor

    return targets


def _from_llama_cpp(name: str, tensor: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    target = encoder_layouts.encoder_tensor(name)
    if target is None:
        raise _none_of(tensor, "Qwen3's or Mistral's")
    metadata = tensor.place.header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in INTERLEAVED or not encoder_layouts.is_turned(name):
        yield target, tensor
        return
    head_dim = head_dim_of(metadata)
    if head_dim is None or head_dim % 2 or tensor.shape[0] % head_dim:
        raise CheckpointBroken(
            f"{tensor.place.header.path}: {name!r} of shape {list(tensor.shape)} is no whole heads of {head_dim} rows"
        )
    yield target, replace(tensor, rows=encoder_layouts.turned_rows(tensor.shape[0], head_dim), stride=2)


def check_decodable(tensor: StoredTensor) -> None:
    """Raises UsageError where the library that decodes it is not installed."""
    for encoding, what in (("gguf", "is a GGUF file"), ("sdnq", "is quantized by SDNQ")):
        if tensor.encoding == encoding and find_spec(encoding) is None:
            raise UsageError(
                f"{tensor.place.header.path} {what}, and {encoding} is not installed: "
                f"pip install 'lowmem-flux2[{encoding}]'"
            )


def plain_view(headers: Iterable[FileHeader]) -> Mapping[str, StoredTensor]:
    """Every tensor as it is stored, under its own name."""
    places = [Place(header, name, info) for header in headers for name, info in header.tensors.items()]
    rows = [place.info.shape[0] if place.info.shape else 1 for place in places]
    return {
        place.name: StoredTensor(place.info.shape, "plain", place, ((0, count),))
        for place, count in zip(places, rows, strict=True)
    }


def packed_blocks(view: Mapping[str, StoredTensor], dims: TransformerSpec) -> tuple[tuple[int, ...], ...]:
    """``BlockSpec.packed`` of each block, where any of their Linears is in GGUF blocks; else empty."""
    doubles = [(f"transformer_blocks.{index}.", DOUBLE_LINEARS) for index in range(dims.num_double)]
    singles = [(f"single_transformer_blocks.{index}.", SINGLE_LINEARS) for index in range(dims.num_single)]
    return _packed(view, (*doubles, *singles))


def packed_layers(view: Mapping[str, StoredTensor], dims: TextEncoderSpec) -> tuple[tuple[int, ...], ...]:
    """The same of each layer of a text encoder that is used."""
    # Only llama.cpp's files are read in GGUF, and this is what their tensors are called here.
    return _packed(view, [(f"model.layers.{index}.", encoder_layouts.LINEARS) for index in range(dims.layers_used)])


def _packed(
    view: Mapping[str, StoredTensor], blocks: Iterable[tuple[str, Sequence[str]]]
) -> tuple[tuple[int, ...], ...]:
    found = []
    for prefix, names in blocks:
        tensors = [view.get(f"{prefix}{name}{_WEIGHT}") for name in names]
        found.append(tuple(tensor.stored_bytes if tensor and tensor.encoding == "gguf" else 0 for tensor in tensors))
    return tuple(found) if any(map(any, found)) else ()


def _is_aid(name: str, places: Mapping[str, Place]) -> bool:
    """Whether a tensor only serves to decode another."""
    if name in _MARKERS:
        return True
    for ending in (*_SCALES, *_IGNORED, _NVFP4):
        if name.endswith(ending) and name.removesuffix(ending) + _WEIGHT in places:
            return True
    owner, dot, leaf = name.rpartition(".")
    if dot and leaf in _BNB_AIDS and owner in places:
        return True
    if leaf in sdnq.AIDS and owner + _WEIGHT in places:
        return True
    return _BNB_STATE in name


def _decoded(name: str, place: Place, places: Mapping[str, Place]) -> StoredTensor:
    """The stored tensor and what decodes it."""
    info = place.info
    encoding: Encoding = "plain"
    shape = info.shape
    aids: Mapping[str, Place] = {}
    state: Mapping[str, Any] = {}
    owner = name.removesuffix(_WEIGHT)
    if info.dtype in BLOCKS:
        encoding = "gguf"
    elif f"{owner}.scale" in places and (config := sdnq.config_beside(place.header.path)) is not None:
        aids = {leaf: places[f"{owner}.{leaf}"] for leaf in sdnq.AIDS if f"{owner}.{leaf}" in places}
        encoding, (shape, state) = "sdnq", _sdnq(name, place, aids, config)
    elif info.dtype in FP8:
        encoding, aids = "scaled", {"scale": _scale(name, place, places)}
    elif owner + _NVFP4 in places:
        raise CheckpointBroken(
            f"{place.header.path}: {name!r} is stored as NVFP4 (it has a {_NVFP4[1:]!r}), which is not read here: take "
            "the bf16, fp8 or GGUF release"
        )
    elif found := _bnb_state(name, places):
        encoding, state = "bnb4", _bnb_values(found)
        shape = tuple(state["shape"])
        aids = {leaf: places[f"{name}.{leaf}"] for leaf in _BNB_AIDS if f"{name}.{leaf}" in places}
        _check_bnb(place, info, state, aids)
    elif info.dtype in ("I8", "U8") and name.endswith(_WEIGHT):
        hint = " (a weight of bitsandbytes' LLM.int8)" if f"{owner}.SCB" in places else ""
        if f"{owner}.scale" in places:
            hint = " (of SDNQ's, it seems, whose config.json is not beside it: give the folder of the whole model)"
        raise CheckpointBroken(
            f"{place.header.path}: {name!r} is stored as {info.dtype}{hint}, a quantization that is not read here: "
            "take the bf16, fp8, GGUF or bitsandbytes 4-bit release"
        )
    return StoredTensor(shape, encoding, place, ((0, shape[0] if shape else 1),), aids, state)


def _sdnq(
    name: str, place: Place, aids: Mapping[str, Place], config: Mapping[str, Any]
) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """Shape and settings of a Linear's weight; where it was made for a quantized matmul it lies transposed."""
    settings = sdnq.settings_of(config, name, place.header.path)
    info, scale = place.info, aids["scale"].info.shape
    bits, svd = sdnq.bits_of(settings["weights_dtype"]), aids.get("svd_up")
    values, rest = divmod(info.num_bytes * 8, bits) if info.dtype != "BOOL" else (info.num_values, 0)
    transposed = len(scale) == 2 and scale[0] == 1 < scale[1] and info.shape[-1:] == scale[1:]
    if transposed:
        rows = scale[1]
    elif scale and scale[0] > 1:
        rows = scale[0]
    elif info.num_values == values and len(info.shape) > 1:  # one scale for all of it
        rows = info.shape[0]
    else:
        rows = max(svd.info.shape) if svd else 0
    if rest or not rows or values % rows:
        raise CheckpointBroken(
            f"{place.header.path}: {name!r} is {info.dtype} of shape {list(info.shape)} with scales of shape "
            f"{list(scale)}, which is no {settings['weights_dtype']} matrix of SDNQ's: weights and config.json are of "
            "different models, or it is of a form that is not read here"
        )
    return (rows, values // rows), {**settings, "transposed": transposed}


def _scale(name: str, place: Place, places: Mapping[str, Place]) -> Place:
    """Of an fp8 weight: one value, or one a row."""
    owner = name.removesuffix(_WEIGHT)
    for ending in _SCALES:
        scale = places.get(owner + ending)
        if scale is None:
            continue
        values, rows = scale.info.num_values, place.info.shape[0]
        if values not in (1, rows) or scale.info.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointBroken(
                f"{place.header.path}: the scale {scale.name!r} is {scale.info.dtype} of shape "
                f"{list(scale.info.shape)}: one value, or one for each of the weight's {rows} rows, is read here"
            )
        return scale
    raise CheckpointBroken(
        f"{place.header.path}: {name!r} is stored as {place.info.dtype} without a scale (neither "
        f"{owner + _SCALES[0]!r} nor {owner + _SCALES[1]!r} is there): what its values are cannot be told; take a "
        "release with scales, or the bf16 one"
    )


def _bnb_state(name: str, places: Mapping[str, Place]) -> Place | None:
    owner = name.removesuffix(_WEIGHT)
    for kind in ("nf4", "fp4"):
        if found := places.get(f"{owner}{_BNB_STATE}{kind}"):
            return found
    return None


def _bnb_values(place: Place) -> Mapping[str, Any]:
    """The quantization state: JSON in a tensor of bytes (bitsandbytes, functional.QuantState.as_dict)."""
    try:
        with place.header.path.open("rb") as file:
            file.seek(place.offset)
            values: Mapping[str, Any] = json.loads(file.read(place.info.num_bytes).decode("utf-8"))
        if not all(isinstance(values[key], int) for key in ("blocksize",)) or len(values["shape"]) != 2:
            raise ValueError(f"{dict(values)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointBroken(f"{place.header.path}: the state {place.name!r} cannot be read: {error}") from error
    return values


def _check_bnb(place: Place, info: TensorInfo, state: Mapping[str, Any], aids: Mapping[str, Place]) -> None:
    values, block = prod(state["shape"]), state["blocksize"]
    nested = "nested_blocksize" in state
    needed = _BNB_AIDS if nested else _BNB_AIDS[:2]
    missing = [leaf for leaf in needed if leaf not in aids]
    if missing:
        raise CheckpointBroken(f"{place.header.path}: {place.name!r} lacks its {', '.join(missing)}")
    if info.num_bytes != -(-values // 2) or aids["absmax"].info.num_values != -(-values // block):
        raise CheckpointBroken(
            f"{place.header.path}: {place.name!r} has {info.num_bytes} bytes and {aids['absmax'].info.num_values} "
            f"absmax, its state tells of the shape {state['shape']} in blocks of {block}"
        )
