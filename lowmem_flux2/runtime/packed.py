"""Blocks of a GGUF file, held and streamed as they are in it, each weight expanded when its Linear runs.

The file's row ranges are read straight into the block's span: nothing is prepared, nothing is quantized again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import GGUF, GGUF_PIECE_WEIGHTS
from lowmem_flux2.planning.gguf_header import BLOCKS
from lowmem_flux2.runtime.checkpoint import TensorFile, Tensors
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.layout import BlockSource, Layout, layout_of
from lowmem_flux2.runtime.quantize import gguf_values
from lowmem_flux2.runtime.stored_linear import StoredLinear


class GgufLinear(StoredLinear):
    """A weight in GGUF blocks of one type, which run along its rows. Expanded in fp32, then in the compute dtype: the
    same values as those of the unquantized formats that are read from the file."""

    format_name = GGUF
    kind: ClassVar[str]
    weight: torch.Tensor

    @classmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        weights, size = BLOCKS[cls.kind]
        return {"weight": ((rows, columns // weights * size), torch.uint8)}

    def dequantize(self) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        expanded = torch.empty(shape, dtype=self.compute_dtype, device=self.weight.device)
        step = max(1, GGUF_PIECE_WEIGHTS // self.in_features)
        for first in range(0, self.out_features, step):
            blocks = self.weight[first : first + step].reshape(-1, BLOCKS[self.kind][1])
            part = expanded[first : first + step]
            part.copy_(gguf_values(self.kind, blocks, torch.float32).view(part.shape))
        return expanded


LINEARS: dict[str, type[GgufLinear]] = {
    kind: type(f"Gguf{kind.replace('_', '')}Linear", (GgufLinear,), {"kind": kind}) for kind in BLOCKS
}
"""A class for each type, so that compiled blocks know it."""


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """A block read from a GGUF file: its quantized Linears as they are, all else in the compute dtype."""

    layout: Layout
    files: TensorFile
    packed: frozenset[str]

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        for place in self.layout.places:
            if place.stored_name in self.packed:
                self.files.read_packed(place.stored_name, place.view(span), direct)
            else:
                self.files.read_into(place.stored_name, place.view(span), direct)


def packed_sources(blocks: Blocks, tensors: Tensors, dtype: torch.dtype) -> list[BlockSource]:
    """Convert the Linears that the file has quantized, on the meta device, and pair each block with its tensors.

    Raises:
        UsageError: the tensors are not those of a GGUF file.
    """
    if not isinstance(tensors, TensorFile):
        raise UsageError(f"{tensors.folder}: weights in {GGUF} are read from a GGUF file alone")
    return [
        _packed(module, prefix, tensors, dtype) for module, prefix in zip(blocks.modules, blocks.prefixes, strict=True)
    ]


def _packed(module: nn.Module, prefix: str, files: TensorFile, dtype: torch.dtype) -> PackedBlock:
    packed = set()
    for parent, leaf, name, linear in list(_linears(module)):
        stored_name = f"{prefix}{name}.weight"
        kind = files.packed_kind(stored_name)
        if kind is not None:
            files.check_shape(stored_name, (linear.out_features, linear.in_features))
            parent._modules[leaf] = LINEARS[kind](linear, dtype)
            packed.add(stored_name)
    return PackedBlock(layout_of(module, prefix, dtype), files, frozenset(packed))


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """Parent, name there, name in the block, and the Linear."""
    for path, parent in module.named_modules():
        for leaf, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, leaf, f"{path}.{leaf}" if path else leaf, child
