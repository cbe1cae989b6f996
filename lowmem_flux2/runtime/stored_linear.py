"""A Linear whose weight is stored in some format and expanded to the compute dtype when it runs: what all share.

The stored tensors are plain buffers, so layouts, streaming and the prepared store treat a quantized block like any
other. `quantize` has the formats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from math import gcd
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from lowmem_flux2.planning.formats import NF4_BLOCK

PIECE_WEIGHTS = 1 << 18
"""Quantized at a time: temporaries of 1 MiB that stay in a core's cache, whatever the Linear's size."""


def piece_rows(columns: int) -> int:
    """Rows quantized at a time: about ``PIECE_WEIGHTS``, and whole nf4 blocks at any width."""
    step = NF4_BLOCK // gcd(NF4_BLOCK, columns)
    return max(1, PIECE_WEIGHTS // columns // step) * step


class StoredLinear(nn.Module):
    """A Linear with its weight in a stored format: storage tensors are buffers, the bias stays in compute dtype."""

    format_name: ClassVar[str]

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = dtype
        for name, (shape, kind) in self.storage(linear.out_features, linear.in_features, dtype).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device="meta"))
        self.bias: nn.Parameter | None = None
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.empty_like(linear.bias, dtype=dtype, device="meta"), requires_grad=False)

    @classmethod
    @abstractmethod
    def storage(cls, rows: int, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each storage tensor of a (rows, columns) weight."""

    @classmethod
    def quantize(cls, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Storage tensors of a weight; scales in the compute dtype unless the format says otherwise."""
        rows, columns = weight.shape
        kinds = cls.storage(rows, columns, dtype)
        made = {name: torch.empty(shape, dtype=kind) for name, (shape, kind) in kinds.items()}
        working = made | cls.scratch(rows, columns)
        step = piece_rows(columns)
        for first in range(0, rows, step):
            cls.fill_rows(working, first, weight[first : first + step].to(dtype))
        cls.finish(working)
        return made

    @classmethod
    def scratch(cls, rows: int, columns: int) -> dict[str, torch.Tensor]:
        """What ``fill_rows`` leaves for ``finish``, beside the storage tensors."""
        return {}

    @classmethod
    def fill_rows(cls, storage: Mapping[str, torch.Tensor], first: int, weight: torch.Tensor) -> None:
        """Quantize ``piece_rows`` rows of a weight in the compute dtype, or what is left of them, from a multiple of
        that on, into its storage tensors and scratch. From any thread."""
        for name, part in cls.quantize_rows(weight).items():
            start = first * len(part) // len(weight)
            storage[name][start : start + len(part)] = part

    @classmethod
    def quantize_rows(cls, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values of the storage tensors of whole rows, for formats that treat each row by itself."""
        raise NotImplementedError

    @classmethod
    def finish(cls, storage: Mapping[str, torch.Tensor]) -> None:
        """Fill the storage tensors that need all rows."""
        return

    @abstractmethod
    def dequantize(self) -> torch.Tensor:
        """The weight (rows, columns) in the compute dtype; lives while one matmul runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dequantize(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format_name}"
