"""LoRA adapters: which file at which scale, and what it takes.

A LoRA (arXiv:2106.09685) adds to a Linear's weight W a product of two thin matrices: W + scale alpha / rank B A, with
the down factor A (rank, in_features) and the up factor B (out_features, rank). At run time the product is applied to
the activations, so that W stays as it is stored: quantized, streamed, on disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import ALIGNMENT_BYTES
from lowmem_flux2.units import real_number


@dataclass(frozen=True, slots=True)
class Lora:
    """What is asked for: a safetensors file, and how much of it."""

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``; a file whose name ends in a colon and a number needs ``:1`` after it.

        Raises:
            UsageError: no file name, or a scale that is not finite.
        """
        path, colon, number = text.rpartition(":")
        if colon:
            try:
                return cls.of(path, float(number))
            except ValueError:
                pass
        return cls.of(text, 1.0)

    @classmethod
    def of(cls, path: str | Path, scale: float) -> Lora:
        """Checked, with the file's whole path, so that a plan means the same file anywhere.

        Raises:
            UsageError: no file name, or a scale that is not finite.
        """
        if not str(path):
            raise UsageError("--lora: there is no file name; write FILE or FILE:SCALE")
        if not math.isfinite(real_number(f"--lora {path}: the scale", scale)):
            raise UsageError(f"--lora {path}: the scale is {scale}, which is no finite number")
        return cls(str(Path(path).expanduser().absolute()), float(scale))

    def __str__(self) -> str:
        return f"{self.path}:{self.scale!r}"


LoraLike = Lora | str | Path | tuple[str | Path, float]


def lora_files(given: Sequence[LoraLike]) -> tuple[Lora, ...]:
    """LoRAs as a Python caller may give them: a file, a pair of file and scale, or text as on the command line.

    Raises:
        UsageError: one alone, which would be read letter by letter; something else; or as ``Lora.parse``.
    """
    if isinstance(given, str | Path | Lora):
        raise UsageError("loras: give a list of them, even for one")
    made = []
    for one in given:
        if isinstance(one, Lora):
            made.append(one)
        elif isinstance(one, str):
            made.append(Lora.parse(one))
        elif isinstance(one, Path):
            made.append(Lora.of(one, 1.0))
        elif isinstance(one, tuple) and len(one) == 2:
            made.append(Lora.of(*one))
        else:
            raise UsageError(f"loras: give files, or pairs of file and scale, not {one!r}")
    return tuple(made)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA as part of a workload: what it is, and the values (elements of the compute dtype) of its factors.

    Args:
        path: where it was found; another copy of the same file is the same adapter.
        fingerprint: of the file's header and a sample of its values.
        values: of factors that are on the device in every step.
        once_values: of factors of Linears that are run once per generation.
        tensors: how many factors there are.
        rank: the largest of one Linear.
        matched, unmatched: keys that were used, and those that name nothing in this model.
    """

    path: str = field(compare=False)
    scale: float
    fingerprint: str
    values: int
    once_values: int
    tensors: int
    rank: int
    matched: int
    unmatched: int

    @property
    def name(self) -> str:
        return Path(self.path).name

    def __str__(self) -> str:
        return f"{self.name} ({self.fingerprint}) at {self.scale:g}"


def kept_bytes(adapters: Sequence[Adapter], dtype_bytes: int) -> int:
    """Factors that are on the device in every step, each aligned."""
    return sum(each.values * dtype_bytes + each.tensors * ALIGNMENT_BYTES for each in adapters)


def once_bytes(adapters: Sequence[Adapter], dtype_bytes: int) -> int:
    """Factors that are there before any block is loaded, and dropped with the conditioning modules."""
    return sum(each.once_values * dtype_bytes + each.tensors * ALIGNMENT_BYTES for each in adapters if each.once_values)


def product_bytes(adapters: Sequence[Adapter], tokens: int, dtype_bytes: int) -> int:
    """The activations between a Linear's down and up factors: (tokens, ranks of all adapters)."""
    return tokens * sum(each.rank for each in adapters) * dtype_bytes
