"""BlockStreamer: blocks of one component, each resident on the device or brought into a slot just before its use.

    arenas                       slots (device)              compute
    ┌ gpu: resident blocks ┐ ───────────────────────────────► used in place
    │ pinned / pageable    │ ─ copy k+1 while k computes ───► slot (k+1) mod n
    └ disk: files, store   ┘ ─ read into a ring, then copy ─► slot ...

A block's tensors lie in one span, each aligned to 256 bytes, so a block is one copy. Slots are allocated once; there
is no allocation in the loop. On a GPU the host issues the copies of pinned blocks on one stream and never waits for
them: the compute stream waits for the copy's event, and the copy stream for the event after the slot's last use.
Pageable and disk blocks are brought by a worker thread, for which the host may have to wait, and so are pinned ones
right behind them, so that copies keep the order of use. With ``device=cpu`` the same code runs, the worker thread in
place of the copy stream.

What is ordered, and by what:

    a slot:          kernels done ─ freed event ─► copy ─ copied event ─► the next block's kernels
    a ring entry:    copy done ─ copied event ─► read of the next block ─ same thread ─► its copy
    worker to loop:  copied event recorded ─ future ─► compute stream waits for it
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import nn

from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.layout import BlockSource, allocate, bind, unbind
from lowmem_flux2.runtime.pinning import Pinning
from lowmem_flux2.runtime.transport import Transport, transport_for
from lowmem_flux2.units import format_bytes

PAGE_BYTES = 4096
"""Memory is pinned in whole pages, and a page that two spans shared could be pinned for one of them only."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """A device buffer for one streamed block, its ring entry where disk blocks are staged, and its two events."""

    span: torch.Tensor
    staging: torch.Tensor | None
    copied: int
    freed: int


@dataclass(frozen=True, slots=True)
class _Use:
    """A streamed block that has been sent for: which, into which slot, and the worker's future where it brings it."""

    block: int
    slot: _Slot
    brought: Future[None] | None


class BlockStreamer:
    """Hands out the blocks of one component in order, round after round, each with its weights in place.

    A round that is given up (the consumer raised, or dropped the iterator) does not count: the next ``round`` begins
    again at the first block. A round that is not needed, or nothing of it but its first block, is left out by ``skip``,
    which moves nothing.

    Args:
        blocks: modules on the meta device, in the order of use.
        sources: where each block's weights are read, with their layout.
        placements: one per block.
        device: compute device.
        slots: device buffers for streamed blocks; the prefetch depth is one less.
        rounds: how many times all blocks are used; nothing is prefetched beyond the last.
        warn: called with one line when pinning fails.
        transport: copies, events and waits; None takes the device's own.
        pinning: how much may be pinned, beyond which memory stays pageable; None for no limit.
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
        transport: Transport | None = None,
        pinning: Pinning | None = None,
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
        self._warn = warn
        self._pinning = pinning
        self._has_warned = False
        self._transport = transport_for(device) if transport is None else transport
        self._worker = self._transport.worker()
        self._spans: dict[int, torch.Tensor] = {}
        self._registered: list[torch.Tensor] = []
        self._inline: set[int] = set()
        self._slots: list[_Slot] = []
        self._is_closed = False
        self._round = 0  # the number of the round under way; an older iterator is out of date
        self._rounds_left = rounds
        self._uses: deque[_Use] = deque()
        self._at: int | None = None  # the block that is handed out
        self._held: _Slot | None = None  # its slot
        self._is_cut = False  # the last round ended after its first block, which is held for the next one
        self._bringing: Future[None] | None = None  # what was given to the worker last
        self._issued = 0  # uses ever sent for; the next goes into slot issued mod n
        self._origin = 0  # the use that was, or will be, a round's first block
        self._limit = 0  # uses that may be sent for in all
        try:
            self._slots = self._make_slots(min(slots, len(self._streamed)))
            self._load()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------------ loading

    def _make_slots(self, count: int) -> list[_Slot]:
        largest = max((self._layouts[index].total_bytes for index in self._streamed), default=0)
        is_staged = Placement.DISK in self._placements and self._transport.is_asynchronous
        made = []
        for _ in range(count):
            staging = self._host_span(largest, pin=True)[0] if is_staged else None
            made.append(
                _Slot(allocate(largest, self._device), staging, self._transport.event(), self._transport.event())
            )
        for slot in made:  # the allocator may have given it memory that kernels under way still use
            self._transport.record_compute(slot.freed)
        return made

    def _load(self) -> None:
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
                arena, is_pinned = self._host_span(total, pin=placement is Placement.PINNED)
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

    def _host_span(self, size_bytes: int, pin: bool) -> tuple[torch.Tensor, bool]:
        """Host memory, and whether it is pinned: registered, since pinned allocations are rounded to a power of two."""
        if not pin or not self._transport.is_asynchronous:
            return allocate(size_bytes, torch.device("cpu")), False
        if self._pinning is not None:
            held = sum(other.numel() for other in self._registered)
            if held + size_bytes > self._pinning.limit_bytes:  # planned so: a ring that may not be pinned
                return allocate(size_bytes, torch.device("cpu")), False
        pages = allocate(-(-size_bytes // PAGE_BYTES) * PAGE_BYTES, torch.device("cpu"))
        failure = self._transport.pin(pages)
        if failure is None:
            self._registered.append(pages)
        else:
            self._warn_once(size_bytes, failure)
        return pages[:size_bytes], failure is None

    def _warn_once(self, size_bytes: int, failure: str) -> None:
        if self._pinning is not None:
            text = self._pinning.warning(size_bytes, failure)
        else:
            plain = f"could not pin {format_bytes(size_bytes)} ({failure}): copying from pageable memory instead"
            text, self._has_warned = None if self._has_warned else plain, True
        if text is not None:
            self._warn(text)

    # ------------------------------------------------------------------------------------------------- a round

    def round(self) -> Iterator[nn.Module]:
        """One pass over all blocks. Copies of the next round's first blocks are already under way when it ends.

        Kernels that use a block must be enqueued, on the stream that is current here, before the next one is asked for.

        Raises:
            ValueError: the streamer is closed, or another round was begun since.
            CheckpointBroken: a block that rests on disk cannot be read.
        """
        self._begin()
        number = self._round
        for index, block in enumerate(self._blocks):
            self._at = index
            if self._placements[index] is Placement.GPU or self._held is not None:
                yield block
            else:
                bind(block, self._layouts[index], self._take(index).span)
                yield block
            if self._is_closed or number != self._round:
                raise ValueError("this round was given up: the streamer was closed, or another round begun")
            self._release()
            self._prefetch()
        self._at = None
        self._rounds_left = max(0, self._rounds_left - 1)

    def skip(self) -> None:
        """Leave out an announced round, or all of the round under way but its first block. Nothing moves.

        The next round finds that block, and those sent for behind it, in their slots. Kernels that use the block may go
        on being enqueued until then.

        Raises:
            ValueError: the streamer is closed, or the round under way is past its first block.
        """
        if self._is_closed:
            raise ValueError("the streamer is closed")
        if self._at:
            raise ValueError(f"block {self._at} is handed out: only a round's first block can be all of it")
        self._is_cut = self._is_cut or self._at == 0
        self._at = None
        self._round += 1
        self._rounds_left = max(0, self._rounds_left - 1)

    def _begin(self) -> None:
        """Start a round; if the last one was given up in the middle, forget what it had sent for."""
        if self._is_closed:
            raise ValueError("the streamer is closed")
        self._round += 1
        if not self._is_cut:
            self._release()
        self._is_cut = False
        if not self._streamed:
            return
        taken = self._issued - len(self._uses) - (self._held is not None)
        if (taken - self._origin) % len(self._streamed):
            for use in self._uses:
                if use.brought is not None and not use.brought.cancel():
                    use.brought.exception()  # wait: its copy would land in the slot after that of a new use
            self._uses.clear()
            self._origin = taken = self._issued
        self._limit = taken + max(1, self._rounds_left) * len(self._streamed)
        self._prefetch()

    def _prefetch(self) -> None:
        """Send for blocks as long as slots are free and the announced rounds need them."""
        free = len(self._slots) - (self._held is not None)
        while self._issued < self._limit and len(self._uses) < free:
            index = self._streamed[(self._issued - self._origin) % len(self._streamed)]
            slot = self._slots[self._issued % len(self._slots)]
            self._issued += 1
            brought = None
            # Copies keep the order of use: an earlier one must not stand behind what a later one waits for.
            if index in self._inline and (self._bringing is None or self._bringing.done()):
                self._copy(self._spans[index], slot)
            else:
                brought = self._bringing = self._worker.submit(self._bring, index, slot)
            self._uses.append(_Use(index, slot, brought))

    def _take(self, index: int) -> _Slot:
        """The slot with a block in it, for kernels enqueued from now on."""
        use = self._uses.popleft()
        assert use.block == index, f"block {index} asked for, block {use.block} was prefetched"
        if use.brought is not None:
            use.brought.result()
        self._transport.compute_waits(use.slot.copied)
        self._held = use.slot
        return use.slot

    def _release(self) -> None:
        """The consumer is done with the block it holds: its slot is free after the kernels enqueued so far."""
        if self._held is not None:
            self._transport.record_compute(self._held.freed)
            self._held = None

    def _copy(self, source: torch.Tensor, slot: _Slot) -> None:
        self._transport.copy_waits(slot.freed)
        self._transport.copy(source, slot.span[: source.numel()])
        self._transport.record_copy(slot.copied)

    def _bring(self, index: int, slot: _Slot) -> None:
        """On the worker thread: read (disk) or copy (host memory) one block into its slot."""
        size_bytes = self._layouts[index].total_bytes
        if self._placements[index] is not Placement.DISK:
            self._copy(self._spans[index], slot)
        elif slot.staging is not None:
            self._transport.host_waits(slot.copied)  # for the entry's last copy, on this thread, not the loop's
            self._sources[index].read_into(slot.staging[:size_bytes], direct=True)
            self._copy(slot.staging[:size_bytes], slot)
        else:
            self._sources[index].read_into(slot.span[:size_bytes], direct=True)

    def close(self) -> None:
        """Stop the worker and give every arena and slot back. The modules return to the meta device."""
        self._is_closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        try:
            self._transport.synchronize()  # copies under way write to slots and read from arenas
        finally:
            for span in self._registered:
                self._transport.unpin(span)
            for block in self._blocks:
                unbind(block)
            self._registered.clear()
            self._spans.clear()
            self._uses.clear()
            self._slots.clear()
            self._held = None
