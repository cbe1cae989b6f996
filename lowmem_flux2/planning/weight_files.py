"""The weight files of a component's folder: which of them count, and what they hold all together."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing
from lowmem_flux2.planning.file_sizes import FileSizes, Held, file_sizes
from lowmem_flux2.planning.gguf_header import is_gguf, read_gguf_header
from lowmem_flux2.planning.headers import FileHeader, read_header
from lowmem_flux2.planning.models import StoredDtype
from lowmem_flux2.planning.stored import StoredTensor, model_view

_STORED_DTYPES: Final[Mapping[str, StoredDtype]] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_BLOCK: Final = re.compile(r"(.*?\b(?:single_transformer_blocks|transformer_blocks|layers))\.(\d+)\.(.+)")
_STEMS: Final = ("diffusion_pytorch_model", "model")


@dataclass(frozen=True, slots=True)
class ComponentWeights:
    """All files of one component (transformer, text_encoder or vae).

    Attributes:
        headers: one per shard.
        num_weights: floating-point values (counters and packed integers are not weights).
        tensor_bytes: bytes of all tensors.
        dtype: the dtype that holds most bytes, as safetensors or GGUF spells it.
        is_quantized: whether those are values of a quantized form, to be decoded.
        sizes: what the files hold of each block, where any of it is quantized.
    """

    folder: Path
    headers: tuple[FileHeader, ...]
    num_weights: int
    tensor_bytes: int
    dtype: str
    is_quantized: bool = False
    sizes: FileSizes | None = None

    @property
    def stored_dtype(self) -> StoredDtype:
        """The majority dtype as a `ModelSpec` names it; bf16 for quantized weights, whose makers had bf16 ones.

        Raises:
            CheckpointBroken: the weights are stored in a dtype that is not read here.
        """
        if self.is_quantized:
            return "bf16"
        if self.dtype not in _STORED_DTYPES:
            raise CheckpointBroken(
                f"{self.folder}: most of its weights are stored as {self.dtype}, which is not read here: read are "
                "bf16, fp16, fp32, fp8 with scales, bitsandbytes' 4 bits, and GGUF"
            )
        return _STORED_DTYPES[self.dtype]


def every_tensor(name: str) -> bool:
    """All of a component's tensors are needed."""
    return True


def no_tensor(name: str) -> bool:
    """None has to be there: for readers that complain of a missing tensor when they are asked for it."""
    return False


def weight_header(path: Path) -> FileHeader:
    """The header of a safetensors or GGUF file, whichever it is.

    Raises:
        CheckpointMissing, CheckpointBroken: see `read_header` and `read_gguf_header`.
    """
    return read_gguf_header(path) if is_gguf(path) else read_header(path)


def component_headers(folder: Path, needs: Callable[[str], bool] = every_tensor) -> tuple[FileHeader, ...]:
    """Read the headers of a component folder's weight files: a single file, or the shards of its index that are there.

    Args:
        needs: the tensors that must be there, by name: of a text encoder not all layers are used, and shards without a
            needed tensor may be missing.

    Raises:
        CheckpointMissing: no folder, no weights in it, or a shard that the index names is not there.
        CheckpointBroken: a file or the index is broken, or a shard lacks a tensor that the index puts there.
    """
    if not folder.is_dir():
        raise CheckpointMissing(f"{folder} does not exist: this component has no weights here")
    weights, is_index = _weight_file(folder)
    if not is_index:
        return (weight_header(weights),)
    places = read_index(weights)
    needed = {shard for tensor, shard in places.items() if needs(tensor)}
    shards = sorted(shard for shard in set(places.values()) if shard in needed or (folder / shard).is_file())
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise CheckpointMissing(
            f"{folder}: {len(absent)} of {len(needed)} shards are missing: {', '.join(absent)}; finish the download"
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
    for tensor, shard in places.items():
        if shard in headers and tensor not in headers[shard].tensors:
            raise CheckpointBroken(
                f"{folder / shard} lacks the tensor {tensor!r} that {weights.name} puts there: "
                "index and shards are of different downloads"
            )
    return tuple(headers[shard] for shard in shards)


def check_component(
    folder: Path, accepted_weights: Collection[int] = (), needs: Callable[[str], bool] = every_tensor
) -> ComponentWeights:
    """Sum up the needed tensors of a component and compare their number of weights with what its config implies.

    Args:
        folder: for example ``model/transformer``.
        accepted_weights: counts that are right; empty for no comparison.
        needs: the tensors that are counted, and must be there, by name.

    Raises:
        CheckpointMissing, CheckpointBroken: as `component_headers`, or the count is none of the accepted ones.
    """
    return check_headers(folder, component_headers(folder, needs), accepted_weights, needs)


def check_headers(
    path: Path,
    headers: tuple[FileHeader, ...],
    accepted_weights: Collection[int] = (),
    needs: Callable[[str], bool] = every_tensor,
) -> ComponentWeights:
    """`check_component` of files whose headers have been read; ``path`` is for messages."""
    needed = {name: tensor for name, tensor in model_view(headers).items() if needs(name)}
    held = needed.values()
    if not held:
        raise CheckpointBroken(f"{path}: its files hold no tensors that are needed")
    lacking = list(_lacking(needed))
    num_weights = sum(tensor.num_values for tensor in held if tensor.is_weight)
    bytes_of: Counter[tuple[str, bool]] = Counter()
    for tensor in held:
        bytes_of[tensor.place.info.dtype, tensor.encoding != "plain"] += tensor.stored_bytes
    dtype, is_quantized = bytes_of.most_common(1)[0][0]
    if accepted_weights and num_weights not in accepted_weights:
        wanted = " or ".join(str(count) for count in sorted(accepted_weights))
        if lacking:
            raise CheckpointBroken(
                f"{path}: it lacks the tensor {lacking[0]!r}, which its other blocks have: it holds {num_weights} "
                f"weights, the config implies {wanted}"
            )
        raise CheckpointBroken(
            f"{path}: the files hold {num_weights} weights (mostly {dtype}), the config implies {wanted}: "
            "config and weights are of different models, or the weights are quantized in a form that is not known here"
        )
    sizes = file_sizes(
        [Held(name, tensor.stored_bytes, tensor.num_values, tensor.encoding) for name, tensor in needed.items()]
    )
    return ComponentWeights(path, headers, num_weights, sum(bytes_of.values()), dtype, is_quantized, sizes)


def _lacking(view: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Tensors that some blocks have and others do not.

    Raises:
        CheckpointBroken: a tensor of another shape than those of the same name in other blocks.
    """
    blocks: dict[str, set[str]] = {}
    shapes: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for name, tensor in view.items():
        if found := _BLOCK.match(name):
            blocks.setdefault(found[1], set()).add(found[2])
            shapes.setdefault((found[1], found[3]), {})[found[2]] = tensor.shape
    for (prefix, leaf), of in shapes.items():
        usual = Counter(of.values()).most_common(1)[0][0]
        for index, shape in of.items():
            if shape != usual:
                raise CheckpointBroken(
                    f"{next(iter(view.values())).place.header.path}: tensor {f'{prefix}.{index}.{leaf}'!r} has shape "
                    f"{list(shape)}, in other blocks it has {list(usual)}"
                )
        yield from (f"{prefix}.{index}.{leaf}" for index in sorted(blocks[prefix] - of.keys()))


def _weight_file(folder: Path) -> tuple[Path, bool]:
    """The single weight file of a folder, or its shard index (and True)."""
    for stem in _STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return index, True
        if (single := folder / f"{stem}.safetensors").is_file():
            return single, False
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    singles = sorted((*folder.glob("*.safetensors"), *folder.glob("*.gguf")))
    if len(indexes) == 1:
        return indexes[0], True
    if len(singles) == 1 and not indexes:
        return singles[0], False
    if not indexes and any(_SHARD.search(path.name) for path in singles):
        raise CheckpointMissing(f"{folder}: its shards are there without their index; finish the download")
    if indexes or singles:
        names = ", ".join(path.name for path in indexes or singles)
        raise CheckpointBroken(f"{folder}: cannot tell which files to use without an index: {names}")
    if any(folder.glob("*.bin")):
        raise CheckpointBroken(f"{folder}: it has pickle weights (.bin) only; this engine reads safetensors")
    raise CheckpointMissing(f"{folder} has no .safetensors weights")


def read_index(path: Path) -> dict[str, str]:
    """Which shard beside an index file holds which tensor.

    Raises:
        CheckpointBroken: not an index, or it names files elsewhere.
    """
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointBroken(f"{path} is not a shard index with a weight_map: {error!r}") from error
    if not isinstance(places, dict) or not places:
        raise CheckpointBroken(f"{path}: its weight_map is empty or not an object")
    for shard in places.values():
        if not isinstance(shard, str) or shard != Path(shard).name:
            raise CheckpointBroken(f"{path}: {shard!r} in its weight_map is not the name of a file beside it")
    return places
