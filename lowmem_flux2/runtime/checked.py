"""Small safetensors files that carry a checksum of all that is in them: embeddings, latents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from lowmem_flux2.runtime.device import exhausted

CHECKSUM = "checksum"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Damaged(Exception):
    """Not a file of ours, cut short, or with bytes that are not those that were written."""


def write_checked(file: IO[bytes], tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> None:
    """Write the tensors straight from where they are, and the texts with a checksum as the file's metadata.

    The format is https://github.com/huggingface/safetensors#format; its library would first make copies of all.

    Args:
        tensors: contiguous, on the host, of floating point.
    """
    header: dict[str, object] = {"__metadata__": {**texts, CHECKSUM: _checksum(tensors, texts)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and texts of a file that ``write_checked`` made.

    Raises:
        FileNotFoundError, OSError: cannot be read.
        Damaged: is not what was written.
    """
    while True:
        with path.open("rb") as held:  # safe_open has errors of its own for what cannot be opened
            try:
                return _read_checked(path)
            except Damaged:
                if _is_still(path, held):
                    raise
        # Another process replaced or dropped it, and safetensors opens a file anew for each tensor: once more.


def _is_still(path: Path, held: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(held.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _read_checked(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            texts: dict[str, str] = dict(file.metadata() or {})
            # Cloned, since those views of the file lie at any multiple of 8 bytes, where kernels round differently.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        is_whole = texts.pop(CHECKSUM) == _checksum(tensors, texts)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if exhausted(error) is not None:
            raise
        raise Damaged(f"{path}: {error!r}") from error
    if not is_whole:
        raise Damaged(f"{path}: its bytes are not those that were written")
    return tensors, texts


def _checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(sorted(texts.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
