"""The best placement of a stage's blocks, exactly, by branch and bound.

A stage's blocks are put in an order of residency. The first ``resident`` of them stay on the device, more of them in
RAM, of which the first ``pinned`` are pinned and the others pageable; the rest is on disk. All (slots, resident, in
memory, pinned) that fit are in the running, for each variant of the stage (format, batch, chunk, step cache).

A box is a range of each number. No plan in it is better than one that has every block at the fastest tier which any
of them gives it, and yet the least to load: the time line never gets longer when a block comes faster (see
``timeline``). The box of the least bound is split until it is a single plan, which is then the best of all. Since what
is in the running depends on nothing but the model, more memory only adds to it, and a faster machine only makes each
of it cheaper: the result never gets worse.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from lowmem_flux2.planning.cost import load_ns, room_bytes
from lowmem_flux2.planning.passages import Tiers
from lowmem_flux2.planning.plan import Limits, Placement, StagePlan
from lowmem_flux2.planning.residency import TieredBlocks, Variant
from lowmem_flux2.planning.selection import StreamFrom
from lowmem_flux2.planning.timeline import ROUNDS_SIMULATED, simulate

SLOT_COUNTS = (2, 3, 4, 1)
"""With two, one block computes while the next is copied; more look further ahead, which slow disk blocks among fast
ones need; a single one takes the least memory, and hides nothing."""

SPREAD_SLOTS = (2, 3)
"""Of these, where the disk has a part in each step, also with blocks of all sizes spread over the step alike."""

Value = Callable[[int, int, int, int], int]
"""What a stage is judged by, the less the better: of its time, of its loading, and of reading and copying blocks
again in later rounds, in nanoseconds. Must not decrease in any of them."""


Others = Literal["ram", "disk", "either"]
"""Where the streamed blocks rest: all in RAM, so that no ring is needed; all on disk; or some on disk at least."""


@dataclass(frozen=True, slots=True)
class _Root:
    """One variant with one number of slots; ``residents`` are the numbers of resident blocks that fit the device."""

    blocks: TieredBlocks
    slots: int
    residents: tuple[int, ...]
    others: Others

    def box(self, placement: StreamFrom) -> _Box:
        """All of the root's plans."""
        total, is_free = self.blocks.total, self.others == "either"
        fewest, most = (total, total) if placement == "pinned" else (0, total if placement == "auto" else 0)
        if self.others == "disk":
            most = 0
        return _Box(self, (0, 0, fewest), (len(self.residents) - 1, total - 1 if is_free else 0, most))


class _Box(NamedTuple):
    """Ranges, both ends included: a place in ``root.residents``, blocks in memory of either kind, pinned ones of them.

    The second is not used but where the root's others are ``either``.
    """

    root: _Root
    least: tuple[int, int, int]
    most: tuple[int, int, int]

    @property
    def is_point(self) -> bool:
        return self.least == self.most

    @property
    def least_peak_bytes(self) -> int:
        """Peak of the compute device's memory with the fewest residents; for more, it is hardly ever less."""
        return self.root.blocks.peak(self.root.residents[self.least[0]], self.root.slots)

    def below(self, most_bytes: int) -> _Box | None:
        """Without the most residents as long as they have a higher peak; itself, or None where no plan is left."""
        blocks, first, last = self.root.blocks, self.least[0], self.most[0]
        while last >= first and blocks.peak(self.root.residents[last], self.root.slots) > most_bytes:
            last -= 1
        if last == self.most[0]:
            return self
        return None if last < first else _Box(self.root, self.least, (last, *self.most[1:]))

    def trimmed(self, cut: _Cut) -> _Box:
        """Without numbers in memory, and of pinned blocks, that fit with none of the others."""
        resident, held, pinned = self.most
        if self.root.others == "either":
            held = min(held, cut.ram)
        pinned = min(pinned, max(cut.ram - self.root.residents[self.least[0]], self.least[2]))
        return _Box(self.root, self.least, (resident, held, pinned))

    def halves(self) -> Iterator[_Box]:
        """Split along the longest range, the faster half first."""
        widths = [most - least for least, most in zip(self.least, self.most, strict=True)]
        axis = widths.index(max(widths))
        middle = (self.least[axis] + self.most[axis]) // 2
        below, above = list(self.most), list(self.least)
        below[axis], above[axis] = middle, middle + 1
        yield _Box(self.root, (above[0], above[1], above[2]), self.most)
        yield _Box(self.root, self.least, (below[0], below[1], below[2]))


class Search:
    """The best of some variants of a stage, found step by step.

    ``bound`` is what no plan beats, None when none fits. It grows as it advances until ``found`` is the best plan,
    not yet priced, and ``bound`` its value.
    """

    def __init__(
        self,
        families: Iterable[Sequence[Variant]],
        placement: StreamFrom,
        limits: Limits,
        value: Value,
    ) -> None:
        """``families``: variants that differ in their chunks alone, the largest chunks first."""
        self.found: StagePlan | None = None
        self._placement, self._limits, self._value = placement, limits, value
        self._heap: list[tuple[int, int, _Box | Sequence[Variant], _Cut | None]] = []
        self._pushed = 0
        self._most_bytes: int | None = None
        for family in families:
            compute = min(sum(variant.work.compute_ns) * variant.work.rounds for variant in family)
            self._push(value(compute, 0, 0, 0), family)

    @property
    def bound(self) -> int | None:
        return self._heap[0][0] if self._heap else None

    def run(self) -> StagePlan | None:
        """Go on until the best is found; None when nothing fits."""
        while self.found is None and self._heap:
            self.advance()
        return self.found

    def advance(self, steps: int = 16) -> None:
        """Some steps, fewer where the best is found."""
        for _ in range(steps):
            if self.found is None and self._heap:
                self._step()

    def front(self, step_bytes: int, known: Sequence[tuple[int, int]] = ()) -> Iterator[StagePlan]:
        """The best, then the best with a peak lower by at least ``step_bytes``, and so on. Uses the search up.

        Args:
            known: (value, peak) of plans that count for more: nothing is looked for that takes neither less.
        """
        while self._heap:
            self.found = None
            while self.found is None and self._heap:
                beaten = [peak for value, peak in known if value <= self._heap[0][0]]
                if beaten and (self._most_bytes is None or min(beaten) <= self._most_bytes):
                    self._most_bytes = min(beaten) - 1
                self._step()
            if self.found is not None:
                box = heapq.heappop(self._heap)[2]
                assert isinstance(box, _Box)
                self._most_bytes = box.least_peak_bytes - step_bytes
                yield self.found

    def _step(self) -> None:
        """Look closer at what has the least bound: open a family, time a box, or split one that is timed."""
        bound, order, box, cut = heapq.heappop(self._heap)
        if not isinstance(box, _Box):
            for root in roots(box, self._placement, self._limits):
                self._consider(root.box(self._placement), bound)
        elif self._most_bytes is not None and (lower := box.below(self._most_bytes)) is not box:  # the front
            if lower is not None:
                self._consider(lower, bound)
        elif cut is not None:
            heapq.heappush(self._heap, (max(bound, self._timed(box.root, cut)), order, box, None))
        elif box.is_point:
            heapq.heappush(self._heap, (bound, order, box, None))
            self.found = _placed(box)
        else:
            for half in box.halves():
                self._consider(half, bound)

    def _consider(self, box: _Box, floor: int) -> None:
        cut = _best_cut(box, self._limits)
        if cut is not None:
            self._push(max(floor, self._value_of(box.root, cut, cut.least_ns)), box.trimmed(cut), cut)

    def _push(self, bound: int, box: _Box | Sequence[Variant], cut: _Cut | None = None) -> None:
        heapq.heappush(self._heap, (bound, self._pushed, box, cut))
        self._pushed += 1

    def _timed(self, root: _Root, cut: _Cut) -> int:
        """The value of the cut by its time line; exact where the box is one plan."""
        work, blocks = root.blocks.work, root.blocks
        ways = blocks.ways(cut.resident, cut.pinned, cut.sure, cut.ram)
        rounds = min(work.rounds, ROUNDS_SIMULATED)
        line = simulate(ways, blocks.compute, work.between_ns, root.slots, rounds)
        return self._value_of(root, cut, cut.load_ns + work.first_ns + line.total_ns(work.rounds))

    def _value_of(self, root: _Root, cut: _Cut, time_ns: int) -> int:
        again = root.blocks.work.rounds - 1
        return self._value(time_ns, cut.load_ns, again * cut.reads_ns, again * cut.copies_ns)


class _Cut(NamedTuple):
    """The fastest of all that a box's plans may be, in each respect: ranks where tiers end, and nanoseconds.

    Blocks from ``sure`` to ``ram`` are in RAM in some of the plans only. ``reads_ns`` and ``copies_ns`` are of a round;
    ``least_ns`` is what no plan takes less than, by the sums of its lanes.
    """

    resident: int
    pinned: int
    sure: int
    ram: int
    load_ns: int
    reads_ns: int
    copies_ns: int
    least_ns: int


def _best_cut(box: _Box, limits: Limits) -> _Cut | None:
    """None where none of the box's plans fits, or it has none."""
    root, blocks = box.root, box.root.blocks
    n, work, sums = blocks.total, blocks.work, blocks.bytes
    few, many = root.residents[box.least[0]], root.residents[box.most[0]]
    if root.others == "ram":
        sure, ram, pins = n, n, min(box.least[2], n - many)
    elif root.others == "disk":
        sure, ram, pins = few, many, 0
    else:
        sure, ram = max(box.least[1], few), box.most[1]
        many = min(many, ram)
        pins = min(box.least[2], max(sure - many, 0))
        if many < few or box.least[2] > ram - few:
            return None  # more resident, or pinned, than in memory
    pinned, ring = min(many + box.most[2], ram), 0
    if not blocks.on_host:
        ring = root.slots * blocks.largest_streamed[many] if root.others != "ram" else 0
        room = room_bytes(work, limits.ram_bytes) - ring
        ram = min(ram, bisect_right(sums, sums[many] + room) - 1)
        pinned = min(pinned, ram, bisect_right(sums, sums[many] + min(room, limits.pinnable_bytes - ring)) - 1)
        if ram < sure:
            return None
        pinned = max(pinned, many)
    least_pinned = sums[many + pins] - sums[many] if few == many else pins * blocks.smallest
    largest = blocks.largest_resident[few]
    if not blocks.on_host:
        held = max(sums[sure] - sums[many], least_pinned)
        if blocks.ram(Tiers(sums[few], least_pinned, held - least_pinned, 0, largest, 0, ring)) > limits.ram_bytes:
            return None
        if least_pinned and least_pinned + ring > limits.pinnable_bytes:
            return None
    in_ram = max(sums[sure] - sums[few], least_pinned)
    load = load_ns(work, Tiers(sums[few], least_pinned, in_ram - least_pinned, 0, largest, 0, ring), blocks.hardware)
    reads, copies = blocks.traffic(many, pinned, sure, ram)
    least = load + work.first_ns + work.rounds * max(blocks.compute_ns, reads, copies)
    if root.others != "ram":
        # What is not read at first is read later: the fewest reads of all, and what follows the last one.
        tiers = Tiers(0, least_pinned, max(sums[ram] - least_pinned, 0), 0, 0, 0, ring)
        least = max(least, load_ns(work, tiers, blocks.hardware) + work.rounds * reads + blocks.after_read_ns)
    return _Cut(many, pinned, sure, ram, load, reads, copies, least)


def roots(family: Sequence[Variant], placement: StreamFrom, limits: Limits) -> Iterator[_Root]:
    """All blocks resident, or streamed through each number of slots.

    Smaller chunks only save memory: of a later variant, only what does not fit in an earlier one.
    """
    taken: dict[tuple[int, Others, bool], set[int]] = {}
    for variant in family:
        kinds = [(variant.blocks, cut) for cut in cuts(variant.blocks, placement)]
        kinds += [(variant.spread_blocks, cut) for _, cut in kinds if cut[0] in SPREAD_SLOTS and cut[1] == "either"]
        for blocks, (slots, others, numbers) in kinds:
            before = taken.setdefault((slots, others, blocks is not variant.blocks), set())
            fitting = blocks.fitting(numbers, slots, others == "ram", limits)
            fitting = [resident for resident in fitting if resident not in before]
            before.update(fitting)
            if fitting:
                yield _Root(blocks, slots, tuple(fitting), others)


def cuts(blocks: TieredBlocks, placement: StreamFrom) -> Iterator[tuple[int, Others, range]]:
    """(slots, where streamed blocks rest, numbers of residents) that are worth looking at."""
    n = blocks.total
    if placement in ("auto", "resident"):
        yield 0, "ram", range(n, n + 1)
    if placement == "resident":
        return
    kinds: tuple[Others, ...] = ("ram", "either")
    if placement in ("pinned", "pageable"):
        kinds = ("ram",)
    elif placement == "disk" or blocks.on_host:  # on a CPU a copy of a block in RAM wins nothing over the file
        kinds = ("disk",)
    # With no more blocks than slots, streaming takes the memory of residency: only a fixed placement asks for that.
    spare = 1 if placement == "auto" else 0
    for slots in SLOT_COUNTS:
        for others in kinds:
            yield slots, others, range(n - slots - spare + 1)


def _placed(box: _Box) -> StagePlan:
    """The plan of a point."""
    root, blocks = box.root, box.root.blocks
    resident = root.residents[box.least[0]]
    ram = {"ram": blocks.total, "disk": resident, "either": box.least[1]}[root.others]
    pinned = min(resident + box.least[2], ram)
    placements = [Placement.DISK] * blocks.total
    for rank, index in enumerate(blocks.order[:ram]):
        placements[index] = (
            Placement.GPU if rank < resident else Placement.PINNED if rank < pinned else Placement.PAGEABLE
        )
    return replace(
        blocks.bare, block_placements=tuple(placements), slots=root.slots, prefetch_depth=max(root.slots - 1, 0)
    )
