"""Stand-ins under which the stages run without weights, files or a device: only shapes and dtypes are real.

Tensors are torch's fake ones. Kernels count as CUDA's own where torch, seeing no GPU, would choose others that need
more memory. What a value decides is answered so that the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowmem_flux2.planning.formats import ALIGNMENT_BYTES
from lowmem_flux2.planning.headers import FileHeader
from lowmem_flux2.planning.models import Component
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.runtime.checkpoint import Tensors
from lowmem_flux2.runtime.components import Blocks
from lowmem_flux2.runtime.device import DTYPES
from lowmem_flux2.runtime.layout import Layout, layout_of
from lowmem_flux2.runtime.live import LiveBytes, rounded
from lowmem_flux2.runtime.quantize import W8A8Linear
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.transport import HostTransport

FAKE_GPU = torch.device("lazy")
"""Plays the GPU. Where torch finds none, fake "cuda" tensors cannot be indexed (it asks for a device guard), and fake
"cpu" ones could not be told from the host's; every build knows "lazy", and no real tensor is ever there."""
MEMORY_EFFICIENT_ALIGNMENT = 8
"""Elements: rows of a bias for memory-efficient attention are padded to a multiple (attention.cpp, pad_bias)."""
FLASH_HEAD_DIM = 256
"""Flash attention takes no wider heads (sdp_utils.cpp)."""


# ------------------------------------------------------------------------------------------------------- kernels


class FakeKernels(TorchFunctionMode):
    """Answers what fake tensors cannot, and lets attention and RMS norm allocate what their CUDA kernels do.

    Every span is aligned, every token another one, every value finite. Without ``cuda`` the kernels are this build's
    own for the CPU.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.data_ptr:
            return 0
        if func is torch.Tensor.__bool__ or func is torch.Tensor.item:
            return True
        if getattr(func, "__name__", "") == "unique":
            return torch.empty(args[0].numel(), dtype=args[0].dtype), torch.empty_like(args[0])
        if self._cuda and func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if self._cuda and func in (functional.rms_norm, torch.rms_norm):
            return _rms_norm(args[0])
        return func(*args, **kwargs)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """(B, heads, S, head_dim) each. As ``scaled_dot_product_attention`` chooses on Ampere and later.

    Flash attention where there is no mask, in 16 bits, heads up to 256 wide; else the memory-efficient kernel, for
    which a boolean mask becomes an additive one, its rows padded.
    """
    if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= FLASH_HEAD_DIM:
        result: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return result
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype)
            bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
            attn_mask = bias
        width = attn_mask.shape[-1]
        if width % MEMORY_EFFICIENT_ALIGNMENT:
            attn_mask = functional.pad(attn_mask, (0, -width % MEMORY_EFFICIENT_ALIGNMENT))[..., :width]
        attn_mask = attn_mask.expand(*query.shape[:-1], width)
    result = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)[0]
    return result


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    """aten::_fused_rms_norm: the result, and the reciprocal root of each row's mean square in fp32, dropped at once."""
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return normed


# ------------------------------------------------------------------------------------------------------- weights


class FakeTensors:
    """The tensors of a component: whatever is asked for is there."""

    def __init__(self, folder: Path, hidden_size: int) -> None:
        self.folder = folder
        self._hidden_size = hidden_size

    def names(self) -> Iterable[str]:
        return ("layers.0.input_layernorm.weight",)  # where `text_decoder_root` looks

    def read_into(self, name: str, destination: torch.Tensor, direct: bool = False) -> None:
        return

    def read_rows(self, name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(len(rows), self._hidden_size, dtype=dtype)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class _FakeBlock:
    layout: Layout

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        return


class _AtOnce(Executor):
    """A worker that does its work where it is given, since fake tensors are one thread's."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class _NoTransport(HostTransport):
    """Copies nothing; asynchronous for a GPU, so that disk blocks get their staging ring."""

    def __init__(self, is_asynchronous: bool) -> None:
        self.is_asynchronous = is_asynchronous

    def worker(self) -> Executor:
        return _AtOnce()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        return

    def pin(self, span: torch.Tensor) -> str | None:
        return None


class FakeWeights:
    """Weights of the right shapes and no values. Opening a component begins the fake world, ``close`` ends it.

    Not before: a module is built from real tensors that nobody touches, and then moved to the meta device.

    Args:
        repeats: how many blocks of the model each block of the stage stands for; empty for one each. Their arenas are
            allocated as large as for all of them.
        alike: of an integer matmul's pieces only the first and the last are run: none leaves anything but its result,
            which lies in a tensor of all.

    Attributes:
        slot_bytes: what slots take on the device.
        arena_bytes: what blocks take that rest in RAM.
        once_bytes: the device's peak before any block was loaded.
    """

    def __init__(
        self,
        folder: Path,
        hidden_size: int,
        live: LiveBytes,
        kernels: FakeKernels,
        repeats: Sequence[int] = (),
        alike: bool = False,
    ) -> None:
        self._folder = folder
        self._hidden_size = hidden_size
        self._live = live
        self._kernels = kernels
        self._repeats = repeats
        self._alike = alike
        self._modes = ExitStack()
        self._absent: list[torch.Tensor] = []
        self.slot_bytes = 0
        self.arena_bytes = 0
        self.once_bytes = 0

    def open(self, component: Component) -> FakeTensors:
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), self._live, self._kernels):
            self._modes.enter_context(mode)
        return FakeTensors(self._folder / component, self._hidden_size)

    def adapter(self, header: FileHeader) -> FakeTensors:
        return FakeTensors(header.path, self._hidden_size)

    def close(self) -> None:
        self._absent.clear()
        self._modes.close()

    def streamer(
        self,
        stage: StagePlan,
        blocks: Blocks,
        tensors: Tensors,
        device: torch.device,
        rounds: int,
        warn: Callable[[str], None],
    ) -> BlockStreamer:
        dtype = DTYPES[stage.compute_dtype]
        modules = blocks.converted(stage.weight_format, dtype).modules
        if self._alike:
            _stand_for_pieces(modules)
        layouts = [layout_of(module, "", dtype) for module in modules]
        sizes = [layout.total_bytes for layout in layouts]
        self.once_bytes = self._live.peak_bytes[device.type]
        self._live.restart_peak()
        self._stand_for_the_absent(stage, sizes, device)
        streamed = [
            size for size, placed in zip(sizes, stage.block_placements, strict=True) if placed is not Placement.GPU
        ]
        count, largest = min(stage.slots, len(streamed)), max(streamed, default=0)
        self.slot_bytes = count * rounded(largest + ALIGNMENT_BYTES)
        return BlockStreamer(
            blocks=blocks.modules,
            sources=[_FakeBlock(layout) for layout in layouts],
            placements=stage.block_placements,
            device=device,
            slots=stage.slots,
            rounds=rounds,
            warn=warn,
            transport=_NoTransport(is_asynchronous=device.type != "cpu"),
        )

    def _stand_for_the_absent(self, stage: StagePlan, sizes: Sequence[int], device: torch.device) -> None:
        whole = [size * count for size, count in zip(sizes, self._repeats or [1] * len(sizes), strict=True)]
        self.arena_bytes = sum(_arena_bytes(stage, whole, where) for where in (Placement.PINNED, Placement.PAGEABLE))
        for placement in (Placement.GPU, Placement.PINNED, Placement.PAGEABLE):
            missing = _arena_bytes(stage, whole, placement) - _arena_bytes(stage, sizes, placement)
            where = device if placement is Placement.GPU else torch.device("cpu")
            if missing:
                self._absent.append(torch.empty(missing, dtype=torch.uint8, device=where))


def _stand_for_pieces(blocks: Iterable[torch.nn.Module]) -> None:
    for linear in (module for block in blocks for module in block.modules()):
        if isinstance(linear, W8A8Linear):
            linear.starts = lambda total, step: sorted({0, (total - 1) // step * step})


def _arena_bytes(stage: StagePlan, sizes: Sequence[int], placement: Placement) -> int:
    """What the streamer's arena of one placement takes."""
    total = sum(size for size, placed in zip(sizes, stage.block_placements, strict=True) if placed is placement)
    return rounded(total + ALIGNMENT_BYTES) if total else 0
