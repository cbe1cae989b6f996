"""Read GGUF headers, never the weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package reads it too, by way of
numpy and a quarter of a second, which planning does not spend; tests compare both.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

from lowmem_flux2.errors import CheckpointBroken, CheckpointMissing
from lowmem_flux2.planning.headers import FileHeader, TensorInfo, again

MAGIC: Final = b"GGUF"
_TRANSFORMERS: Final = ("flux", "flux2")
"""``general.architecture`` of files with a FLUX transformer; which FLUX it is, the tensors tell."""
INTERLEAVED: Final = ("llama", "mistral3")
"""Of text encoders whose query and key rows llama.cpp's rotary embedding wants in pairs; Mistral Small 3 is either."""
_ARCHITECTURES: Final = (*_TRANSFORMERS, "qwen3", *INTERLEAVED)
PLAIN_TYPES: Final = ("F32", "F16", "BF16")
BLOCKS: Final[Mapping[str, tuple[int, int]]] = {
    **{"Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34)},
    **{"Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210)},
}
"""Quantized types that are read here: weights a block, and its bytes (``GGML_QUANT_SIZES`` of gguf-py)."""
_SIZES: Final[Mapping[str, tuple[int, int]]] = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), **BLOCKS}
_TYPES: Final[Mapping[int, str]] = {
    **{0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K"},
    **{12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
_SCALARS: Final[Mapping[int, str]] = {
    **dict(enumerate("BbHhIif?")),
    **{10: "Q", 11: "q", 12: "d"},
}
"""Value types of one number, as the letters of ``struct``."""
_STRING, _ARRAY = 8, 9
_LONGEST_TEXT_BYTES: Final = 1 << 26
_DEFAULT_ALIGNMENT: Final = 32


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> FileHeader:
    """Read and check the header of a GGUF file with a transformer or text encoder. Shapes are in torch's order: rows
    first.

    Raises:
        CheckpointMissing: there is no such file.
        CheckpointBroken: not GGUF, truncated, of another architecture, or with a type that is not read here.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            return _parse(_Reader(path, file, file_bytes), file_bytes)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointMissing(f"{path} does not exist or is not a file") from error
    except OSError as error:
        raise CheckpointBroken(f"{path} cannot be read: {error}") from error


def head_dim_of(metadata: Mapping[str, Any]) -> int | None:
    """Rows of a head in a text encoder's file; None where it does not tell."""
    architecture = metadata.get("general.architecture")
    stated = metadata.get(f"{architecture}.attention.key_length")
    width, heads = (metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "attention.head_count"))
    if stated is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        stated = width // heads
    return stated if isinstance(stated, int) and stated > 0 else None


class _Reader:
    """The header's values one after the other, little-endian."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self.path, self._file, self._left = path, file, file_bytes

    def bytes(self, count: int) -> bytes:
        found = self._file.read(count) if count <= self._left else b""
        if len(found) != count:
            raise CheckpointBroken(f"{self.path} is truncated: its header goes beyond its end: {again(self.path)}")
        self._left -= count
        return found

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.bytes(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        length = self.number("Q")
        if length > _LONGEST_TEXT_BYTES:
            raise CheckpointBroken(f"{self.path}: its header holds a text of {length} bytes: it is damaged")
        return self.bytes(length).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A number or a text; None for a list, such as the vocabulary, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                self._pass(count * struct.calcsize(f"<{_SCALARS[element]}"))
            elif element == _STRING:
                for _ in range(count):  # one too long ends in 'truncated'
                    self._pass(self.number("Q"))
            else:
                for _ in range(count):
                    self.value(element)
            return None
        raise CheckpointBroken(f"{self.path}: a value of the unknown type {kind} in its header")

    def _pass(self, count: int) -> None:
        if count > self._left:
            raise CheckpointBroken(f"{self.path} is truncated: its header goes beyond its end: {again(self.path)}")
        self._file.seek(count, os.SEEK_CUR)
        self._left -= count

    @property
    def position(self) -> int:
        return self._file.tell()


def _parse(reader: _Reader, file_bytes: int) -> FileHeader:
    path = reader.path
    if reader.bytes(4) != MAGIC:
        raise CheckpointBroken(f"{path} is not GGUF: it does not begin with those letters")
    version = reader.number("I")
    if version not in (2, 3):
        turned = "big-endian GGUF" if version >> 24 in (2, 3) else f"GGUF version {version}"
        raise CheckpointBroken(f"{path}: {turned}; little-endian ones of versions 2 and 3 are read here")
    tensors, values = reader.number("Q"), reader.number("Q")
    fields = {}
    for _ in range(values):
        key = reader.text()
        if (value := reader.value(reader.number("I"))) is not None:
            fields[key] = value
    architecture = fields.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointBroken(
            f"{path}: its GGUF architecture is {architecture!r}; read here are transformers of FLUX.2 "
            f"({', '.join(_TRANSFORMERS)}) and its text encoders (qwen3, {', '.join(INTERLEAVED)})"
        )
    if fields.get("split.count", 1) not in (0, 1):
        raise CheckpointBroken(
            f"{path} is one of {fields['split.count']} files: join them with llama.cpp's `llama-gguf-split --merge`"
        )
    held = [_tensor(reader) for _ in range(tensors)]
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointBroken(f"{path}: its alignment is {alignment!r}")
    data_begin = -(-reader.position // alignment) * alignment
    found = dict(held)
    if len(found) != len(held):
        raise CheckpointBroken(f"{path}: a tensor's name appears twice in its header")
    end = data_begin + max((info.end for info in found.values()), default=0)
    if end > file_bytes:
        raise CheckpointBroken(
            f"{path} is truncated: its header describes {end} bytes, the file has {file_bytes}: {again(path)}"
        )
    return FileHeader(path, file_bytes, data_begin, MappingProxyType(found), MappingProxyType(fields))


def _tensor(reader: _Reader) -> tuple[str, TensorInfo]:
    name, dimensions = reader.text(), reader.number("I")
    if dimensions > 4:
        raise CheckpointBroken(f"{reader.path}: tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reversed([reader.number("Q") for _ in range(dimensions)]))
    kind, begin = reader.number("I"), reader.number("Q")
    dtype = _TYPES.get(kind, f"type {kind}")
    if dtype not in _SIZES or (dtype in BLOCKS and dimensions < 2):
        raise CheckpointBroken(
            f"{reader.path}: tensor {name!r} of shape {list(shape)} is stored as {dtype}, which is not read here; "
            f"read are {', '.join(_SIZES)}"
        )
    weights, size = _SIZES[dtype]
    if shape and shape[-1] % weights:
        raise CheckpointBroken(
            f"{reader.path}: tensor {name!r} has rows of {shape[-1]} values, no whole blocks of {dtype} ({weights})"
        )
    return name, TensorInfo(dtype, shape, begin, begin + prod(shape) // weights * size)
