"""Small safetensors files that carry a checksum of all that is in them: embeddings, latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

CHECKSUM = "checksum"


class Damaged(Exception):
    """Not a file of ours, cut short, or with bytes that are not those that were written."""


def checked_bytes(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> bytes:
    """A safetensors file: the tensors, and the texts as its metadata with a checksum beside them."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, {**texts, CHECKSUM: _checksum(whole, texts)})


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and texts of a file that ``checked_bytes`` made.

    Raises:
        FileNotFoundError, OSError: cannot be read.
        Damaged: is not what was written.
    """
    content = path.read_bytes()
    try:
        header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        texts: dict[str, str] = header["__metadata__"]
        written = texts.pop(CHECKSUM)
        # Cloned, since those views lie at any multiple of 8 bytes, where kernels round differently.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(content).items()}
        is_whole = written == _checksum(tensors, texts)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RuntimeError) as error:
        raise Damaged(f"{path}: {error!r}") from error
    if not is_whole:
        raise Damaged(f"{path}: its bytes are not those that were written")
    return tensors, texts


def _checksum(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(sorted(texts.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
