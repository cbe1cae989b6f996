"""Where a module's tensors lie: one contiguous span a block, every tensor aligned, read from the files or the store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from lowmem_flux2.planning.formats import ALIGNMENT_BYTES, SECTOR_BYTES
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.stored_linear import StoredLinear


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One parameter or buffer of a module: its name there, its name in the files, and its bytes in the span."""

    name: str
    stored_name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, span: torch.Tensor) -> torch.Tensor:
        elements = span.view(self.dtype)
        strides = [math.prod(self.shape[after:]) for after in range(1, len(self.shape) + 1)]
        start = elements.storage_offset() + self.offset // self.dtype.itemsize
        return elements.as_strided(self.shape, strides, start)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a module lies in its span of ``total_bytes``, whole sectors."""

    places: tuple[TensorPlace, ...]
    total_bytes: int


def layout_of(module: nn.Module, prefix: str, dtype: torch.dtype) -> Layout:
    """Lay out the parameters and persistent buffers of a module whose stored names are ``prefix + name``.

    Floating-point tensors rest in ``dtype``, others and the storage tensors of a quantized Linear in their own.
    """
    places, offset = [], 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        is_storage = isinstance(owner, StoredLinear) and leaf in owner._buffers
        kept = dtype if tensor.is_floating_point() and not is_storage else tensor.dtype
        places.append(TensorPlace(name, prefix + name, offset, tuple(tensor.shape), kept))
        offset += _aligned(tensor.numel() * kept.itemsize)
    return Layout(tuple(places), _aligned(offset, SECTOR_BYTES))


def _aligned(size_bytes: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return -(-size_bytes // alignment) * alignment


def allocate(size_bytes: int, device: torch.device) -> torch.Tensor:
    """An uninitialised uint8 tensor whose first byte is aligned to a sector (torch's CPU allocator gives 64).

    Never an inference tensor: the worker, whose thread is not in the caller's inference mode, could not write to it.
    """
    with torch.inference_mode(False):
        raw = torch.empty(size_bytes + SECTOR_BYTES, dtype=torch.uint8, device=device)
    skip = -raw.data_ptr() % SECTOR_BYTES
    return raw[skip : skip + size_bytes]


def bind(module: nn.Module, layout: Layout, span: torch.Tensor) -> list[torch.Tensor]:
    """Make the module's parameters and buffers views of the span, and return these, a place each."""
    views = []
    for place in layout.places:
        owner_name, _, leaf = place.name.rpartition(".")
        owner = module.get_submodule(owner_name)
        view = place.view(span)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(view, requires_grad=False)
        else:
            owner._buffers[leaf] = view
        views.append(view)
    return views


def unbind(module: nn.Module) -> None:
    """Put a module back on the meta device, so that nothing keeps its span alive."""
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = torch.empty_like(buffer, device="meta")


class BlockSource(Protocol):
    """Where a block's span comes from: the checkpoint's files, tensor by tensor, or one file of the prepared store."""

    @property
    def layout(self) -> Layout: ...

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        """Fill a host span of ``layout.total_bytes``, from any thread; ``direct`` past the page cache."""
        ...


@dataclass(frozen=True, slots=True)
class CheckpointBlock:
    """A block read from its safetensors files, unquantized."""

    layout: Layout
    files: Tensors

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        for place in self.layout.places:
            self.files.read_into(place.stored_name, place.view(span), direct)


def load_module(
    module: nn.Module, prefix: str, files: Tensors, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Load a whole module that is not streamed; return its span on the device."""
    layout = layout_of(module, prefix, dtype)
    host = torch.device("cpu")
    span = allocate(layout.total_bytes, device)
    for place, view in zip(layout.places, bind(module, layout, span), strict=True):
        if device == host:
            files.read_into(place.stored_name, view)
        else:  # tensor by tensor: the host never holds the whole component
            staging = torch.empty(place.shape, dtype=place.dtype)
            files.read_into(place.stored_name, staging)
            view.copy_(staging)
            del staging  # before the next one is made
    return span
