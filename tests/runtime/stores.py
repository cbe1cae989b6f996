"""What tests of the prepared store share: making entries of the tiny models, and looking at them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from lowmem_flux2 import Engine
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.runtime.observer import Silent
from lowmem_flux2.runtime.prepare import prepare
from lowmem_flux2.runtime.store import PreparedStore, find

ASKED: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "guidance_scale": 4.0,
    "max_sequence_length": 64,
    "seed": 0,
    "output_type": "latent",
}


def latents(folder: Path, cache: Path, weight_format: str, placement: str = "auto", **options: Any) -> torch.Tensor:
    engine = Engine(
        str(folder),
        device="cpu",
        dtype="fp32",
        weight_format=weight_format,
        text_weight_format=weight_format,
        placement=placement,  # type: ignore[arg-type]
        cache_dir=cache,
        **options,
    )
    made: torch.Tensor = engine.generate("a red circle", **ASKED).images
    return made


def prepared(folder: Path, cache: Path, weight_format: str = "int8", **hooks: Any) -> PreparedStore:
    """The tiny transformer, prepared in fp32."""
    spec = resolve_model(str(folder), offline=True).spec
    return prepare(folder, spec, "transformer", weight_format, "fp32", cache, **hooks)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of an entry's blocks."""
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def entries(cache: Path) -> list[str]:
    """Names of all entries, unfinished ones included."""
    return sorted(path.name for path in (cache / "prepared").iterdir() if path.is_dir())


def weights_of(source: Path) -> Path:
    """The transformer's file of a tiny model."""
    return next((source / "transformer").glob("*.safetensors"))


def found(source: Path, cache: Path) -> PreparedStore | None:
    """The entry that ``prepared`` makes, if it is there."""
    return find(source, "transformer", "int8", "fp32", cache)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file, and leave no other trace of it."""
    seen = path.stat()
    with path.open("r+b") as file:
        file.seek(bit // 8)
        old = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([old ^ 1 << bit % 8]))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


class Told(Silent):
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, text: str) -> None:
        self.events.append(text)
