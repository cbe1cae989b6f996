"""Read safetensors headers, never the weights, and say exactly what is wrong with a file that is not one.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON, and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). So a header of at most a few hundred KiB tells dtype, shape and
place of every tensor, and whether the file is whole: most checkpoint trouble is found before a single weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing
from lowmem_flux2.units import format_bytes

_LENGTH_BYTES: Final = 8
_LARGEST_HEADER_BYTES: Final = 100_000_000  # the limit of the safetensors library itself
_ARCHIVES: Final = {b"Rar!": "RAR", b"7z\xbc\xaf": "7-Zip", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "Zstandard"}
_DTYPE_BITS: Final[Mapping[str, int]] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def again(path: Path) -> str:
    """What to do about a file that is not whole. The hub's client takes a blob that is there for a whole one."""
    blob = path.resolve()
    return f"remove {blob} and download it again" if blob.parent.name == "blobs" else "download it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: dtype as safetensors or GGUF spells it (``BF16``, ``Q4_K``), shape, and its bytes [begin, end) of the
    data part."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin

    @property
    def num_values(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What one file holds, safetensors or GGUF. A tensor's first byte is at ``data_begin + tensor.begin`` of it.

    Attributes:
        metadata: a GGUF file's numbers and texts, without its lists; of a safetensors file nothing.
    """

    path: Path
    file_bytes: int
    data_begin: int
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def read_header(path: Path) -> FileHeader:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointMissing: there is no such file.
        CheckpointBroken: it is something else, truncated, or inconsistent; the message says what was found.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            header_bytes = int.from_bytes(start[:_LENGTH_BYTES], "little")
            data_begin = _LENGTH_BYTES + header_bytes
            # The JSON of every safetensors file starts with a brace; without it the "length" is another format's text.
            if start[_LENGTH_BYTES : _LENGTH_BYTES + 1] != b"{" or header_bytes > _LARGEST_HEADER_BYTES:
                _refuse_other_format(path, start, file_bytes, header_bytes)
            if data_begin > file_bytes:
                raise CheckpointBroken(
                    f"{path} is truncated: its header alone needs {data_begin} bytes, the file has {file_bytes}: "
                    f"{again(path)}"
                )
            file.seek(_LENGTH_BYTES)
            text = file.read(header_bytes)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointMissing(f"{path} does not exist or is not a file") from error
    except OSError as error:
        raise CheckpointBroken(f"{path} cannot be read: {error}") from error
    tensors = _parse(path, text)
    _check_layout(path, tensors, file_bytes - data_begin, file_bytes, data_begin)
    return FileHeader(path, file_bytes, data_begin, MappingProxyType(tensors))


def _refuse_other_format(path: Path, start: bytes, file_bytes: int, header_bytes: int) -> NoReturn:
    text = start.lstrip().lower()
    if file_bytes == 0:
        found = f"is empty (0 bytes): {again(path)}"
    elif file_bytes <= _LENGTH_BYTES:
        found = f"is truncated: {file_bytes} bytes are less than a safetensors header: {again(path)}"
    elif start.startswith(b"version https://git-lfs"):
        sizes = [line.split()[1] for line in start.splitlines() if line.startswith(b"size ") and line[5:].isdigit()]
        of = f" of a {format_bytes(int(sizes[0]))} file" if sizes else ""
        found = f"is a git LFS pointer, not the weights themselves{of}: run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        found = f"is an HTML page saved under this name (a login or error page): {again(path)} while logged in"
    elif kind := next((name for magic, name in _ARCHIVES.items() if start.startswith(magic)), None):
        found = f"is a {kind} archive under this name: unpack it"
    elif start.startswith(b"PK\x03\x04") and b"data.pkl" not in start:
        found = "is a ZIP archive under this name, and no pickle of torch's: unpack it"
    elif start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        found = "is a pickle (a torch .bin or .pt file), not safetensors: convert it, or take the safetensors release"
    elif start.startswith(b"GGUF"):
        found = "is a GGUF file, not safetensors"
    elif text.startswith((b"{", b"[")):
        found = f"is a text in JSON, not weights: it begins with {start[:60].decode('utf-8', errors='replace')!r}"
    elif header_bytes > _LARGEST_HEADER_BYTES:
        found = (
            f"is not safetensors: it claims a header of {header_bytes} bytes "
            f"(the most allowed is {_LARGEST_HEADER_BYTES}, the file has {file_bytes})"
        )
    else:
        found = f"is not safetensors: its header does not start with a brace but with {start[8:24]!r}"
    raise CheckpointBroken(f"{path} {found}")


def _parse(path: Path, text: bytes) -> dict[str, TensorInfo]:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointBroken(f"{path}: its header is not valid JSON: {error}") from error
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        tensors[name] = _tensor(f"{path}: tensor {name!r}", entry)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _tensor(where: str, entry: Any) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointBroken(f"{where} has no dtype, shape and data_offsets: {entry!r}") from error
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointBroken(f"{where} has the unknown dtype {dtype!r}")
    numbers = (*shape, begin, end)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers) or end < begin:
        raise CheckpointBroken(f"{where} has an impossible shape or place: shape {list(shape)}, bytes {begin} to {end}")
    info = TensorInfo(dtype, shape, begin, end)
    needed_bits = info.num_values * _DTYPE_BITS[dtype]
    if info.num_bytes * 8 != needed_bits:
        raise CheckpointBroken(
            f"{where}: {dtype} of shape {list(shape)} takes {needed_bits / 8:g} bytes, its place has {info.num_bytes}"
        )
    return info


def _check_layout(
    path: Path, tensors: Mapping[str, TensorInfo], data_bytes: int, file_bytes: int, data_begin: int
) -> None:
    expected_begin = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != expected_begin:
            fault = "overlaps the tensor before it" if tensor.begin < expected_begin else "leaves a gap before it"
            raise CheckpointBroken(
                f"{path}: tensor {name!r} at byte {tensor.begin} {fault} (expected {expected_begin})"
            )
        expected_begin = tensor.end
    if expected_begin > data_bytes:
        raise CheckpointBroken(
            f"{path} is truncated: its header describes {data_begin + expected_begin} bytes "
            f"({format_bytes(data_begin + expected_begin)}), the file has {file_bytes} ({format_bytes(file_bytes)}): "
            f"{again(path)}"
        )
    if expected_begin < data_bytes:
        raise CheckpointBroken(
            f"{path}: {data_bytes - expected_begin} bytes follow the last tensor: the file has {file_bytes}, "
            f"its header describes {data_begin + expected_begin}"
        )
