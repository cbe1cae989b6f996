"""BlockStreamer: blocks of one component, each resident on the device or brought into a slot just before its use.

    arenas                       slots (device)              compute
    ┌ gpu: resident blocks ┐ ───────────────────────────────► used in place
    │ pinned / pageable    │ ─ copy k+1 while k computes ───► slot (k+1) mod n
    └ disk: safetensors    ┘ ─ read into a ring, then copy ─► slot ...

A block's tensors lie in one span, each aligned to 256 bytes, so a block is one copy. Slots are allocated once; there
is no allocation in the loop. On a GPU the host issues the copies of pinned blocks on one stream and never waits for
them: the compute stream waits for the copy's event, and the copy stream for the event after the slot's last use.
Pageable and disk blocks are brought by a worker thread, for which the host may have to wait. With ``device=cpu`` the
same code runs, the worker thread in place of the copy stream.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.device import register_pinned, synchronize, unregister_pinned
from lowmem_flux2.runtime.layout import BlockSource, allocate, bind, unbind


@dataclass(slots=True)
class _Use:
    """One use of a streamed block: which, in which slot, and the future of its copy."""

    block: int
    slot: int
    issued: Future[None] | None


class BlockStreamer:
    """Hands out the blocks of one component in order, round after round, each with its weights in place.

    Args:
        blocks: modules on the meta device, in the order of use.
        sources: where each block's weights are read, with their layout.
        placements: one per block.
        device: compute device.
        slots: device buffers for streamed blocks; the prefetch depth is one less.
        rounds: how many times all blocks are used; nothing is prefetched beyond the last.
        warn: called with one line when pinning fails.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        sources: Sequence[BlockSource],
        placements: Sequence[Placement],
        device: torch.device,
        slots: int,
        rounds: int,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        if not len(blocks) == len(sources) == len(placements):
            raise ValueError(f"{len(blocks)} blocks, {len(sources)} sources, {len(placements)} placements")
        self._blocks = tuple(blocks)
        self._placements = tuple(placements)
        self._sources = tuple(sources)
        self._device = device
        self._layouts = [source.layout for source in sources]
        self._streamed = [index for index, placed in enumerate(placements) if placed is not Placement.GPU]
        if self._streamed and slots < 1:
            raise ValueError("streamed blocks need at least one slot")
        self._worker = ThreadPoolExecutor(1, "block-reader")
        largest = max((self._layouts[index].total_bytes for index in self._streamed), default=0)
        self._slots = [allocate(largest, device) for _ in range(min(slots, len(self._streamed)))]
        self._transport = _CudaTransport(device) if device.type == "cuda" else _HostTransport()
        self._spans: dict[int, torch.Tensor] = {}
        self._registered: list[torch.Tensor] = []
        self._ring: list[torch.Tensor] = []
        self._inline: set[int] = set()
        self._has_warned = False
        self._last_use = rounds * len(self._streamed)
        self._next_use = 0
        self._uses: dict[int, _Use] = {}
        try:
            if Placement.DISK in placements and device.type == "cuda":
                self._ring = [self._host_span(largest, warn, pin=True)[0] for _ in self._slots]
            self._load(warn)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ loading

    def _load(self, warn: Callable[[str], None]) -> None:
        """Read every block that rests in memory: resident ones to the device, the others into their host arena."""
        for placement in (Placement.GPU, Placement.PINNED, Placement.PAGEABLE):
            chosen = [index for index, placed in enumerate(self._placements) if placed is placement]
            total = sum(self._layouts[index].total_bytes for index in chosen)
            if not chosen:
                continue
            on_device = placement is Placement.GPU
            if on_device:
                arena = allocate(total, self._device)
            else:
                arena, is_pinned = self._host_span(total, warn, pin=placement is Placement.PINNED)
                self._inline.update(chosen if is_pinned else ())
            offset = 0
            for index in chosen:
                layout = self._layouts[index]
                span = arena[offset : offset + layout.total_bytes]
                offset += layout.total_bytes
                self._spans[index] = span
                if on_device:
                    bind(self._blocks[index], layout, span)
            if on_device and self._device.type != "cpu":
                self._load_through_host(chosen)
            else:
                for index in chosen:
                    self._sources[index].read_into(self._spans[index])

    def _load_through_host(self, chosen: Sequence[int]) -> None:
        """Read blocks to the device through two host buffers: one is copied while the worker reads the next."""
        largest = max(self._layouts[index].total_bytes for index in chosen)
        buffers = [allocate(largest, torch.device("cpu")) for _ in range(min(2, len(chosen)))]

        def read(number: int) -> torch.Tensor:
            layout = self._layouts[chosen[number]]
            buffer = buffers[number % len(buffers)][: layout.total_bytes]
            self._sources[chosen[number]].read_into(buffer)
            return buffer

        reading = self._worker.submit(read, 0)
        for number, index in enumerate(chosen):
            ready = reading.result()
            if number + 1 < len(chosen):
                reading = self._worker.submit(read, number + 1)
            self._spans[index].copy_(ready)

    def _host_span(self, size_bytes: int, warn: Callable[[str], None], pin: bool) -> tuple[torch.Tensor, bool]:
        """Host memory, and whether it is pinned: registered, since pinned allocations are rounded to a power of two."""
        span = allocate(size_bytes, torch.device("cpu"))
        if not pin or self._device.type != "cuda":
            return span, False
        failure = register_pinned(span, self._device)
        if failure is None:
            self._registered.append(span)
        elif not self._has_warned:
            self._has_warned = True
            warn(
                f"could not pin {size_bytes >> 20} MiB ({failure}): copying from pageable memory instead, which is two "
                "to three times slower; raise the memlock limit (ulimit -l)"
            )
        return span, failure is None

    # ------------------------------------------------------------------------------------------------- a round

    def round(self) -> Iterator[nn.Module]:
        """One pass over all blocks. Copies of the next round's first blocks are already under way when it ends."""
        for index, block in enumerate(self._blocks):
            if self._placements[index] is Placement.GPU:
                yield block
                continue
            use = self._await_copy(index)
            bind(block, self._layouts[index], self._slots[use.slot])
            yield block
            self._transport.used(use.slot)
            ahead = self._next_use + len(self._slots) - 1
            if ahead < self._last_use:
                self._issue(ahead)

    def _await_copy(self, index: int) -> _Use:
        if self._next_use == 0 and not self._uses:
            for number in range(min(len(self._slots), self._last_use)):
                self._issue(number)
        if self._next_use not in self._uses:  # a round more than was announced
            self._issue(self._next_use)
        use = self._uses.pop(self._next_use)
        assert use.block == index, f"block {index} asked for, block {use.block} was prefetched"
        self._next_use += 1
        if use.issued is not None:
            use.issued.result()
        self._transport.await_copy(use.slot)
        return use

    def _issue(self, number: int) -> None:
        index = self._streamed[number % len(self._streamed)]
        slot = number % len(self._slots)
        use = _Use(index, slot, None)
        self._uses[number] = use
        if index in self._inline:
            self._transport.copy(self._spans[index], self._slots[slot], slot)
        else:
            use.issued = self._worker.submit(self._bring, index, slot)

    def _bring(self, index: int, slot: int) -> None:
        """On the worker thread: read (disk) or copy (host memory) one block into its slot."""
        layout = self._layouts[index]
        target = self._slots[slot]
        if self._placements[index] is not Placement.DISK:
            self._transport.copy(self._spans[index], target, slot)
        elif self._ring:
            staged = self._ring[slot]
            self._transport.await_copy_on_host(slot)  # the ring entry's previous copy, on this thread, not the loop's
            self._sources[index].read_into(staged[: layout.total_bytes], direct=True)
            self._transport.copy(staged[: layout.total_bytes], target, slot)
        else:
            self._sources[index].read_into(target[: layout.total_bytes], direct=True)

    def close(self) -> None:
        """Stop the worker and give every arena and slot back. The modules return to the meta device."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        synchronize(self._device)
        for span in self._registered:
            unregister_pinned(span)
        for block in self._blocks:
            unbind(block)
        self._registered.clear()
        self._ring.clear()
        self._slots.clear()
        self._spans.clear()
        self._uses.clear()


class _HostTransport:
    """``device=cpu``: copies happen on the worker thread, whose future is the event."""

    def copy(self, source: torch.Tensor, slot_span: torch.Tensor, slot: int) -> None:
        slot_span[: source.numel()].copy_(source)

    def await_copy(self, slot: int) -> None:
        return

    def await_copy_on_host(self, slot: int) -> None:
        return

    def used(self, slot: int) -> None:
        return


class _CudaTransport:
    """One copy stream; per slot one event after the copy and one after the block that used it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        # Slots may be memory that kernels under way still use.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._copied: dict[int, torch.cuda.Event] = {}
        self._used: dict[int, torch.cuda.Event] = {}

    def copy(self, source: torch.Tensor, slot_span: torch.Tensor, slot: int) -> None:
        with torch.cuda.stream(self._stream):
            if slot in self._used:
                self._stream.wait_event(self._used[slot])
            slot_span[: source.numel()].copy_(source, non_blocking=True)
            event = self._copied.setdefault(slot, torch.cuda.Event())
            event.record(self._stream)

    def await_copy(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied[slot])

    def await_copy_on_host(self, slot: int) -> None:
        if slot in self._copied:
            self._copied[slot].synchronize()

    def used(self, slot: int) -> None:
        event = self._used.setdefault(slot, torch.cuda.Event())
        event.record(torch.cuda.current_stream(self._device))
