"""Live bytes: which tensors' memory exists now, and the most that ever did. For real tensors and fake ones alike.

A storage counts from the operator that made it until its last reference dies, rounded up as CUDA's caching allocator
rounds it. What a kernel takes and gives back inside one operator is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATION_BYTES = 512
"""CUDA's caching allocator hands out multiples of this (c10, kMinBlockSize)."""


def rounded(size_bytes: int) -> int:
    """Bytes that the caching allocator takes for a request."""
    return -(-size_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that this thread's operators make, by device type.

    Storages that were there before are not counted, nor are those on the meta device.

    Attributes:
        now_bytes: live at the moment.
        span_bytes: of these, raw spans as ``layout.allocate`` makes them: weights, at rest or in slots.
        peak_bytes: the most since the start, or since ``restart_peak``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.now_bytes: Counter[str] = Counter()
        self.span_bytes: Counter[str] = Counter()
        self.peak_bytes: Counter[str] = Counter()

    def restart_peak(self) -> None:
        self.peak_bytes = Counter(self.now_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of what is dispatched for fake tensors asks for this
        made = func(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, torch.Tensor) else tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen and not _is_given(storage, args, kwargs):
                    is_span = func is torch.ops.aten.empty.memory_format and leaf.dtype is torch.uint8
                    self._count(storage, leaf.device.type, is_span)
        return made

    def _count(self, storage: torch.UntypedStorage, device: str, is_span: bool) -> None:
        key, size = storage._cdata, rounded(storage.nbytes())
        span = size if is_span else 0

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._seen[key]
            self.now_bytes[device] -= size
            self.span_bytes[device] -= span

        self._seen[key] = weakref.ref(storage, freed)
        self.now_bytes[device] += size
        self.span_bytes[device] += span
        self.peak_bytes[device] = max(self.peak_bytes[device], self.now_bytes[device])


def _is_given(storage: torch.UntypedStorage, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> bool:
    """Whether the storage is an argument's: a view of, or a write to, a tensor that was there before."""
    return any(
        isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata == storage._cdata
        for leaf in tree_leaves((args, kwargs))
    )
