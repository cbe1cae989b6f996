"""LoRA factors on the device, added to what a Linear makes: y += (x A^T) (scale alpha / rank B)^T.

The Linear's own weight is never touched, so it may be quantized, streamed, or in a slot that another block takes next.
All factors of a Linear, of however many files, lie side by side, so that each Linear has one product. They come and go
with a stage; a run without them is as if they had never been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lowmem_flux2.planning.adapter_file import LowRank, read_adapter
from lowmem_flux2.planning.adapters import Lora
from lowmem_flux2.planning.formats import ALIGNMENT_BYTES
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.layout import allocate
from lowmem_flux2.runtime.weights import Weights


class AttachedAdapters:
    """The LoRAs of one stage, attached to the Linears of a module tree; those of scale 0 are left out.

    Raises:
        CheckpointError: a file that is gone, or not what it was when the run was planned.
    """

    def __init__(
        self, loras: Sequence[Lora], model: ModelSpec, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._files = [read_adapter(lora, model) for lora in loras if lora.scale]
        self._weights = weights
        self._dtype = dtype
        self._device = device
        self._handles: list[RemovableHandle] = []

    def attach(self, net: nn.Module, wanted: Callable[[str], bool]) -> None:
        """Load the factors of the Linears whose names are wanted, and add their products to what those make."""
        found: dict[str, list[tuple[int, LowRank]]] = {}
        for number, file in enumerate(self._files):
            for low_rank in file.low_ranks:
                if wanted(low_rank.linear):
                    found.setdefault(low_rank.linear, []).append((number, low_rank))
        if not found:
            return
        shapes = [shape for own in found.values() for shape in _shapes([low_rank for _, low_rank in own])]
        factors = iter(self._factors(shapes))
        with ExitStack() as opened:
            sources = [opened.enter_context(closing(self._weights.adapter(file.header))) for file in self._files]
            for linear, own in found.items():
                down, up = next(factors), next(factors)
                at = 0
                for number, low_rank in own:
                    end = at + low_rank.rank
                    down[at:end] = _read(sources[number], low_rank.down, (low_rank.rank, low_rank.columns))
                    stored = _read(sources[number], low_rank.up, (low_rank.stored_rows, low_rank.rank))
                    rows = torch.cat([stored[first : first + count] for first, count in low_rank.rows])
                    up[:, at:end] = rows.mul_(self._files[number].lora.scale * low_rank.factor)
                    at = end
                self._handles.append(net.get_submodule(linear).register_forward_hook(_adding(down, up)))

    @contextmanager
    def attached(self, net: nn.Module, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Those of some Linears for a while, whatever else is attached."""
        before = len(self._handles)
        try:
            self.attach(net, wanted)
            yield
        finally:
            while len(self._handles) > before:
                self._handles.pop().remove()

    def detach(self) -> None:
        """Take all of them off; their memory is free after that."""
        while self._handles:
            self._handles.pop().remove()

    def _factors(self, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Aligned matrices of these shapes, in one span on the device."""
        sizes = [rows * columns * self._dtype.itemsize for rows, columns in shapes]
        ends = list(accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in sizes))
        span = allocate(ends[-1], self._device)
        return [
            span[start : start + size].view(self._dtype).view(shape)
            for start, size, shape in zip([0, *ends], sizes, shapes, strict=False)
        ]


def _shapes(own: Sequence[LowRank]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a Linear's down and up factors, those of all files side by side."""
    rank = sum(low_rank.rank for low_rank in own)
    return (rank, own[0].columns), (own[0].num_rows, rank)


def _read(tensors: Tensors, name: str, shape: tuple[int, int]) -> torch.Tensor:
    """A factor in fp32, on the host."""
    values = torch.empty(shape)
    tensors.read_into(name, values)
    return values


def _adding(down: torch.Tensor, up: torch.Tensor) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    """A forward hook that adds to a Linear's output, in place: (..., in_features) -> (..., out_features)."""

    def add(linear: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        low = functional.linear(inputs[0], down)
        output.view(-1, output.shape[-1]).addmm_(low.view(-1, low.shape[-1]), up.t())

    return add
