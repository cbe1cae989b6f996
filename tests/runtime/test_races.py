"""The streamer's order of copies, kernels and reads, on a machine that takes every liberty the order leaves.

A kernel is enqueued while the host runs ahead and looks at its weights when it is carried out; it must then see its
block's bytes and nothing else. ``benchmarks/mutate_streaming.py`` shows that each wait is needed for that.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import torch
from adversary import ACTORS, POISON, Machine, Schedule, Stuck
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transports import DEVICE, KINDS, DeferredTransport, torch_cuda, transport_on

from lowmem_flux2.errors import CheckpointBroken
from lowmem_flux2.planning.plan import Placement
from lowmem_flux2.runtime.layout import Layout, allocate, layout_of
from lowmem_flux2.runtime.streaming import BlockStreamer
from lowmem_flux2.runtime.transport import CudaTransport

CPU = torch.device("cpu")
LAZY = Schedule(("loop", "worker", "copies", "kernels"))
EAGER = Schedule(("kernels", "copies", "worker", "loop"))
PINNED, PAGEABLE, DISK, GPU = Placement.PINNED, Placement.PAGEABLE, Placement.DISK, Placement.GPU


@dataclass
class Source:
    """A block whose every byte is its number. Reading takes its time; the reads in ``failing`` break off."""

    layout: Layout
    number: int
    machine: Machine
    reads: list[int]
    failing: set[int]

    def read_into(self, span: torch.Tensor, direct: bool = False) -> None:
        assert span.numel() == self.layout.total_bytes
        self.reads.append(self.number)
        at = len(self.reads) - 1
        span.fill_(POISON)
        self.machine.pause()
        if at in self.failing:
            raise CheckpointBroken(f"block {self.number}")
        span.fill_(self.number)


class Block(nn.Module):
    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_bytes, dtype=torch.uint8, device="meta"), requires_grad=False)


class Run:
    """A streamer on a machine, and what its consumer saw. Block i holds bytes i + 1."""

    def __init__(
        self,
        machine: Machine,
        streamer: BlockStreamer,
        modules: Sequence[nn.Module],
        reads: list[int],
        is_asynchronous: bool,
    ) -> None:
        self.machine, self.streamer, self.reads = machine, streamer, reads
        self._modules, self._is_asynchronous = modules, is_asynchronous
        self._resident = [placed is GPU for placed in streamer._placements]
        self.streamed = self._resident.count(False)
        self.used = 0  # streamed blocks whose kernels were enqueued
        self.copies_before_kernels: list[int] = []  # how many were done when each streamed block's kernels began

    def use(self, index: int, block: nn.Module, is_kept: bool = False) -> None:
        """Enqueue the block's kernels: they look at its weights for a while.

        Afterwards its slot is of no use, unless the block is kept for the next round.
        """
        assert block is self._modules[index]
        (weight,) = block.parameters()
        assert weight.data_ptr() % 256 == 0

        def begin() -> None:
            if not self._resident[index]:
                self.copies_before_kernels.append(self.machine.copies_done)
            look()

        def look() -> None:
            if not bool((weight == index + 1).all()):
                self.machine.faults.append(f"block {index} saw {sorted(set(weight.tolist()))}")

        def spoil() -> None:
            look()
            if not self._resident[index] and not is_kept:
                weight.data.fill_(POISON)

        for step in (begin, spoil):
            if self._is_asynchronous:
                self.machine.kernel(step)
            else:
                self.machine.pause()
                step()
        self.used += not self._resident[index]

    def whole_round(self) -> None:
        handed = 0
        for index, block in enumerate(self.streamer.round()):
            self.use(index, block)
            handed += 1
        assert handed == len(self._modules)

    def cut_round(self) -> Iterator[nn.Module]:
        """A round of which only the first block is used."""
        iterator = self.streamer.round()
        self.use(0, next(iterator), is_kept=True)
        self.streamer.skip()
        return iterator

    def begin_round(self, blocks: int, use_last: bool) -> Iterator[nn.Module]:
        """A round given up after ``blocks`` blocks, the last of them used or not."""
        iterator = self.streamer.round()
        for index, block in enumerate(itertools.islice(iterator, blocks)):
            if use_last or index + 1 < blocks:
                self.use(index, block)
        return iterator

    def check(self) -> None:
        """Everything that is under way is carried out, and all of it was right; the loop waited for the worker only."""
        assert not self.machine.loop_has_waited
        self.machine.synchronize()
        assert self.machine.faults == []


@contextmanager
def running(
    placements: Sequence[Placement],
    slots: int,
    rounds: int,
    schedule: Schedule,
    kind: str = "deferred",
    can_pin: bool = True,
    failing_reads: frozenset[int] = frozenset(),
) -> Iterator[Run]:
    """A streamer whose slots lie where older kernels still write. On the way out it is closed, and must have let go."""
    machine = Machine(schedule)
    modules = [Block(100 + 977 * index % 1400) for index in range(len(placements))]
    reads: list[int] = []
    failing: set[int] = set()
    sources = [
        Source(layout_of(module, "", torch.float32), index + 1, machine, reads, failing)
        for index, module in enumerate(modules)
    ]
    streamed = [
        source.layout.total_bytes for source, placed in zip(sources, placements, strict=True) if placed is not GPU
    ]
    streamer: BlockStreamer | None = None

    def older_kernel() -> None:
        for slot in streamer._slots if streamer is not None else ():
            slot.span.fill_(POISON)

    with transport_on(machine, kind, can_pin) as transport:
        if transport.is_asynchronous:
            machine.kernel(older_kernel)
        streamer = BlockStreamer(
            modules, sources, placements, CPU, slots, rounds, warn=lambda text: None, transport=transport
        )
        lengths = [slot.span.numel() for slot in streamer._slots]
        assert lengths == [max(streamed)] * min(slots, len(streamed)) if streamed else lengths == []
        reads.clear()
        failing.update(failing_reads)
        try:
            yield Run(machine, streamer, modules, reads, transport.is_asynchronous)
        finally:
            streamer.close()
            is_idle, has_worker = machine.is_idle(), machine.has_worker
    assert is_idle, "close left copies or kernels under way"
    assert not has_worker, "close left the worker running"
    assert machine.pinned == set()
    assert machine.faults == []
    assert all(tensor.is_meta for module in modules for tensor in module.parameters())


def orders() -> list[Schedule]:
    return [Schedule(order) for order in itertools.permutations(ACTORS)]


SCHEDULES = st.one_of(st.sampled_from(orders()), st.builds(Schedule, st.just(ACTORS), st.integers(0, 2**32)))
PLACEMENTS = st.lists(st.sampled_from(Placement), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    placements=PLACEMENTS,
    slots=st.integers(1, 4),
    rounds=st.integers(1, 3),
    schedule=SCHEDULES,
    kind=st.sampled_from(KINDS),
    can_pin=st.booleans(),
)
def test_each_kernel_sees_its_block(
    placements: list[Placement], slots: int, rounds: int, schedule: Schedule, kind: str, can_pin: bool
) -> None:
    with running(placements, slots, rounds, schedule, kind, can_pin) as run:
        for _ in range(rounds):
            run.whole_round()
        run.check()
        assert run.used == rounds * run.streamed
        assert run.reads == rounds * [index + 1 for index, placed in enumerate(placements) if placed is DISK]


@settings(max_examples=150, deadline=None)
@given(
    placements=PLACEMENTS,
    slots=st.integers(1, 4),
    rounds=st.integers(1, 3),
    schedule=SCHEDULES,
    kind=st.sampled_from(KINDS),
    given_up=st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=3),
    failing_reads=st.frozensets(st.integers(0, 8), max_size=2),
)
def test_a_round_that_is_given_up_can_be_begun_again(
    placements: list[Placement],
    slots: int,
    rounds: int,
    schedule: Schedule,
    kind: str,
    given_up: list[tuple[int, bool]],
    failing_reads: frozenset[int],
) -> None:
    with running(placements, slots, rounds, schedule, kind, failing_reads=failing_reads) as run:
        left, failures, abandoned = rounds, 0, []
        breaks = deque(given_up)
        while left:
            try:
                if breaks:
                    abandoned.append(run.begin_round(*breaks.popleft()))  # kept: nothing closes the iterator
                else:
                    run.whole_round()
                    left -= 1
            except CheckpointBroken:
                failures += 1
        run.check()
        assert failures <= len(failing_reads)
        assert not run.streamer._uses  # nothing was sent for that no announced round needs
        given_up_rounds = len(given_up) + failures
        assert len(run.reads) <= run.used + given_up_rounds * (slots + 1)


@settings(max_examples=150, deadline=None)
@given(
    placements=PLACEMENTS,
    slots=st.integers(1, 4),
    rounds=st.lists(st.sampled_from(["whole", "cut", "left out", "given up"]), max_size=7),
    schedule=SCHEDULES,
    kind=st.sampled_from(KINDS),
)
def test_a_round_that_is_left_out_or_cut_to_its_first_block_moves_nothing(
    placements: list[Placement], slots: int, rounds: list[str], schedule: Schedule, kind: str
) -> None:
    rounds = [*rounds, "whole"]  # as the last step is always computed
    with running(placements, slots, len(rounds), schedule, kind) as run:
        for one in rounds:
            if one == "given up":
                run.begin_round(2, use_last=True)
            if one in ("given up", "whole"):
                run.whole_round()
            elif one == "cut":
                run.cut_round()
            else:
                run.streamer.skip()
        run.check()
        assert not run.streamer._uses
        if "given up" not in rounds:
            on_disk = [index + 1 for index, placed in enumerate(placements) if placed is DISK]
            assert run.reads == rounds.count("whole") * on_disk


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_first_block_can_be_all_of_a_round(kind: str) -> None:
    with running([PINNED, DISK, GPU], 2, 3, EAGER, kind) as run:
        run.begin_round(2, use_last=True)
        with pytest.raises(ValueError, match="block 1 is handed out"):
            run.streamer.skip()
        run.whole_round()
        cut = run.cut_round()
        with pytest.raises(ValueError, match="given up"):
            next(cut)
    with pytest.raises(ValueError, match="closed"):
        run.streamer.skip()


@settings(max_examples=100, deadline=None)
@given(
    placements=PLACEMENTS,
    slots=st.integers(1, 4),
    schedule=SCHEDULES,
    kind=st.sampled_from(KINDS),
    blocks=st.integers(0, 6),
    failing_reads=st.frozensets(st.integers(0, 8), max_size=1),
)
def test_close_waits_for_all_that_is_under_way(
    placements: list[Placement],
    slots: int,
    schedule: Schedule,
    kind: str,
    blocks: int,
    failing_reads: frozenset[int],
) -> None:
    with running(placements, slots, 3, schedule, kind, failing_reads=failing_reads) as run, suppress(CheckpointBroken):
        run.whole_round()
        run.begin_round(blocks, use_last=True)  # and the streamer is closed


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["deferred", "cuda"])
def test_the_host_runs_ahead_of_everything_and_sends_for_as_many_blocks_as_there_are_slots(
    slots: int, kind: str
) -> None:
    placements, rounds = [PINNED, GPU, PINNED, PINNED, GPU, PINNED], 3
    with running(placements, slots, rounds, LAZY, kind) as run:
        for _ in range(rounds):
            for index, block in enumerate(run.streamer.round()):
                if placements[index] is PINNED:  # wraps around from a round's last block to the next one's first
                    assert len(run.machine.copied) == min(run.used + slots, rounds * run.streamed)
                run.use(index, block)
        assert run.machine.kernels_done == run.machine.copies_done == 0
        sent = [int(span[0]) for span in run.machine.copied]
        assert sent == rounds * [1, 3, 4, 6]
        run.check()


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("placements", [[PINNED] * 4, [DISK] * 4, [PAGEABLE] * 4, [PINNED, DISK, GPU, DISK, PINNED]])
def test_nothing_waits_for_more_than_it_needs(placements: list[Placement], slots: int) -> None:
    """A copy waits for the kernels that used its slot last, kernels for their own block's copy, and no others."""
    with running(placements, slots, 2, Schedule(("loop", "worker", "copies", "kernels"))) as run:
        run.whole_round()
        run.whole_round()
        run.check()
        kernels = list(itertools.accumulate([2] * 2 * len(placements), initial=1))  # two a block; one was there before
        after = [at + 1 for at in range(2 * len(placements)) if placements[at % len(placements)] is not GPU]
        assert run.machine.kernels_before_copy == [1] * slots + [kernels[count] for count in after[:-slots]]
    with running(placements, slots, 2, Schedule(("loop", "worker", "kernels", "copies"))) as run:
        run.whole_round()
        run.whole_round()
        run.check()
        assert run.copies_before_kernels == list(range(1, run.used + 1))


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_ring_is_filled_while_kernels_still_run(slots: int) -> None:
    with running([DISK] * 6, slots, 1, Schedule(("loop", "worker", "copies", "kernels"))) as run:
        for index, block in enumerate(run.streamer.round()):
            if index < 2 * slots:  # the slots' blocks, and those that were read while none of these had been used
                assert run.machine.kernels_done <= 1
            run.use(index, block)
        run.check()


def test_a_read_of_a_round_that_was_given_up_cannot_land_in_the_next_one() -> None:
    """Use 2, of a disk block, is under way into slot 2 when the next round sends block 1 there without the worker."""
    for seed in range(150):
        with running([PINNED, PINNED, DISK, DISK], 3, 1, Schedule(ACTORS, seed)) as run:
            run.begin_round(2, use_last=True)
            run.whole_round()
            run.check()


def test_resident_blocks_come_whole_through_two_host_buffers() -> None:
    """How a GPU's resident blocks are loaded, here into RAM: a buffer is used again while the worker reads on."""
    for schedule in orders():
        with running([GPU] * 5, 0, 1, schedule) as run:
            for span in run.streamer._spans.values():
                span.fill_(POISON)
            run.streamer._load_through_host(range(5))
            run.whole_round()
            run.check()


@pytest.mark.parametrize("kind", KINDS)
def test_one_round_more_than_was_announced_is_read_ahead_but_not_beyond(kind: str) -> None:
    with running([DISK, DISK, DISK], 2, 1, EAGER, kind) as run:
        run.whole_round()
        assert len(run.reads) == 3
        run.whole_round()
        assert len(run.reads) == 6
        for index, block in enumerate(run.streamer.round()):
            run.use(index, block)
            run.machine.pause(until=lambda: len(run.reads) >= min(9, run.used + 1))
        assert len(run.reads) == 9
        run.check()


def test_a_read_that_fails_while_loading_leaves_nothing_behind() -> None:
    machine = Machine(LAZY)
    block, reads = Block(300), [0]
    source = Source(layout_of(block, "", torch.float32), 1, machine, reads, {1})
    with pytest.raises(CheckpointBroken):
        BlockStreamer([block], [source], [PINNED], CPU, 1, 1, transport=DeferredTransport(machine, True))
    assert machine.is_idle() and not machine.has_worker and not machine.pinned


def test_reads_that_had_not_begun_are_dropped_with_their_round() -> None:
    with running([DISK] * 6, 4, 2, Schedule(("loop", "copies", "kernels", "worker"))) as run:
        run.begin_round(2, use_last=True)
        begun = len(run.reads)
        run.whole_round()
        assert len(run.reads) <= begun + 7  # one that was under way, and the round's own six
        run.whole_round()
        run.check()
        run.begin_round(1, use_last=True)
        begun = len(run.reads)
        run.streamer.close()
        assert len(run.reads) <= begun + 1


def test_an_iterator_that_is_out_of_date_says_so() -> None:
    with running([PINNED, GPU], 1, 3, EAGER) as run:
        first = run.begin_round(1, use_last=True)
        run.whole_round()
        with pytest.raises(ValueError, match="given up"):
            next(first)
        last = run.begin_round(1, use_last=True)
    with pytest.raises(ValueError, match="given up"):
        next(last)
    with pytest.raises(ValueError, match="closed"):
        next(run.streamer.round())


@pytest.mark.parametrize("lost", ["copy_waits", "compute_waits", "host_waits", "record_copy", "record_compute"])
def test_the_machine_finds_each_lost_wait_and_event(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeferredTransport, lost, lambda self, event: None)
    found = 0
    for schedule in orders():
        try:
            with running([DISK, PINNED, PAGEABLE, DISK, PINNED], 2, 2, schedule) as run:
                run.whole_round()
                run.whole_round()
                run.check()
        except AssertionError:
            found += 1
    assert found


def test_the_machine_says_when_nobody_can_go_on() -> None:
    with pytest.raises(Stuck, match="everyone waits"):
        Machine(LAZY).pause(until=lambda: False)


def test_the_worker_of_a_second_gpu_has_it_as_its_current_device() -> None:
    machine = Machine(LAZY)
    with torch_cuda(machine):
        transport = CudaTransport(DEVICE)
        with transport.worker() as worker:
            source, target = allocate(4096, CPU), allocate(4096, CPU)
            machine.pin(source)
            worker.submit(transport.copy, source, target).result(timeout=20)
    assert machine.faults == []
