"""The best placement of a stage's blocks, exactly, by branch and bound.

A stage's blocks are put in one order of residency. The first ``resident`` of them stay on the device; of the ``in_ram``
after those the first ``pinned`` are pinned and the others pageable; the rest is on disk. All (slots, resident, in_ram,
pinned) that fit are in the running, for each variant of the stage (format, batch, chunk, step cache).

A box is a range of each number. No plan in it is better than one that has every block at the fastest tier which any
of them gives it, and yet the least to load: the time line never gets longer when a block comes faster (see
``timeline``). The box of the least bound is split until it is a single plan, which is then the best of all. Since what
is in the running depends on nothing but the model, more memory only adds to it, and a faster machine only makes each
of it cheaper: the result never gets worse.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lowmem_flux2.planning.cost import Tiers, load_ns
from lowmem_flux2.planning.plan import Limits, Placement, StagePlan
from lowmem_flux2.planning.residency import TieredBlocks, Variant
from lowmem_flux2.planning.selection import StreamFrom
from lowmem_flux2.planning.timeline import ROUNDS_SIMULATED, simulate

SLOT_COUNTS = (2, 3, 4, 1)
"""With two, one block computes while the next is copied; more look further ahead, which slow disk blocks among fast
ones need; a single one takes the least memory, and hides nothing."""

Value = Callable[[int, int, int, int], int]
"""What a stage is judged by, the less the better: of its time, of its loading, and of reading and copying blocks
again in later rounds, in nanoseconds. Must not decrease in any of them."""


@dataclass(frozen=True, slots=True)
class _Root:
    """One variant with one number of slots.

    Args:
        residents: numbers of resident blocks that fit the device.
        all_in_ram: whether all streamed blocks rest in RAM, so that no ring is needed; else some are on disk.
    """

    blocks: TieredBlocks
    slots: int
    residents: tuple[int, ...]
    all_in_ram: bool

    def box(self, placement: StreamFrom) -> _Box:
        """All of the root's plans."""
        total, free = self.blocks.total, placement == "auto" and not self.blocks.on_host
        in_ram = total - 1 if free and not self.all_in_ram else 0
        fewest, most = (total, total) if placement == "pinned" else (0, total if free else 0)
        return _Box(self, (0, 0, fewest), (len(self.residents) - 1, in_ram, most))


class _Box(NamedTuple):
    """Ranges, both ends included: a place in ``root.residents``, blocks in RAM, pinned blocks among them."""

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
        self._heap: list[tuple[int, int, bool, _Box | Sequence[Variant]]] = []
        self._pushed = 0
        self._most_bytes = 1 << 62
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

    def front(self, step_bytes: int) -> Iterator[StagePlan]:
        """The best, then the best with a peak lower by at least ``step_bytes``, and so on. Uses the search up."""
        while self._heap:
            self.found = None
            while self.found is None and self._heap:
                self._step()
            if self.found is not None:
                box = heapq.heappop(self._heap)[3]
                assert isinstance(box, _Box)
                self._most_bytes = box.least_peak_bytes - step_bytes
                yield self.found

    def _step(self) -> None:
        """Look closer at what has the least bound."""
        bound, order, is_timed, box = heapq.heappop(self._heap)
        if isinstance(box, _Box) and box.least_peak_bytes > self._most_bytes:
            return
        if not isinstance(box, _Box):
            for root in roots(box, self._placement, self._limits):
                self._consider(root.box(self._placement), bound)
        elif not is_timed:
            timed = self._bound(box, timed=True)
            assert timed is not None
            heapq.heappush(self._heap, (max(bound, timed), order, True, box))
        elif box.is_point:
            heapq.heappush(self._heap, (bound, order, True, box))
            self.found = _placed(box)
        else:
            for half in box.halves():
                self._consider(half, bound)

    def _consider(self, box: _Box, floor: int) -> None:
        bound = self._bound(box, timed=False)
        if bound is not None:
            self._push(max(bound, floor), box)

    def _push(self, bound: int, box: _Box | Sequence[Variant]) -> None:
        heapq.heappush(self._heap, (bound, self._pushed, False, box))
        self._pushed += 1

    def _bound(self, box: _Box, *, timed: bool) -> int | None:
        """What no plan of the box beats, exact for a single plan; None where none fits.

        Args:
            timed: from the time line, else from the sums of its blocks.
        """
        root, blocks, limits = box.root, box.root.blocks, self._limits
        n, work, sums = blocks.total, blocks.work, blocks.bytes
        few, many = root.residents[box.least[0]], root.residents[box.most[0]]
        # Ranks where tiers end in the fastest plan of the box; blocks from sure to ram are in RAM in some plans only.
        sure = n if root.all_in_ram else few + box.least[1]
        ram = n if root.all_in_ram else min(many + box.most[1], n - 1)
        if not root.all_in_ram and (sure > n - 1 or box.least[2] > box.most[1]):
            return None  # no block is left for the disk, or there are fewer blocks in RAM than are to be pinned
        pinned = min(many + box.most[2], ram)
        ring = 0 if root.all_in_ram or blocks.on_host else root.slots * blocks.largest_streamed(many)
        least_pinned = sums[min(many + (box.least[2] if root.all_in_ram else min(box.least[1:])), n)] - sums[many]
        largest = blocks.sizes[0] if few else 0
        if not blocks.on_host:
            held = sums[n if root.all_in_ram else min(many + box.least[1], n)] - sums[many]
            needed = Tiers(sums[few], least_pinned, max(held - least_pinned, 0), 0, largest, 0, ring)
            if blocks.ram(needed) > limits.ram_bytes:
                return None
            if least_pinned and least_pinned + ring > limits.pinnable_bytes:
                return None
        in_ram = max(sums[sure] - sums[few], least_pinned)
        loaded = Tiers(sums[few], least_pinned, in_ram - least_pinned, 0, largest, 0, ring)
        load = load_ns(work, loaded, blocks.hardware)
        reads, copies = blocks.traffic(many, pinned, sure, ram)
        if timed:
            ways = blocks.ways(many, pinned, sure, ram)
            rounds = min(work.rounds, ROUNDS_SIMULATED)
            line = simulate(ways, work.compute_ns, work.between_ns, root.slots, rounds)
            time = load + line.total_ns(work.rounds)
        else:
            time = load + work.rounds * max(blocks.compute_ns, reads, copies)
            if not root.all_in_ram:
                # What is not read at first is read later: the fewest reads of all, and what follows the last one.
                first = load_ns(work, Tiers(0, least_pinned, sums[ram] - least_pinned, 0, 0, 0, ring), blocks.hardware)
                time = max(time, first + work.rounds * reads + blocks.after_read_ns)
        return self._value(time, load, (work.rounds - 1) * reads, (work.rounds - 1) * copies)


def roots(family: Sequence[Variant], placement: StreamFrom, limits: Limits) -> Iterator[_Root]:
    """All blocks resident, or streamed through each number of slots, from RAM alone or from disk too.

    Smaller chunks only save memory: of a later variant, only what does not fit in an earlier one.
    """
    taken: set[tuple[int, bool, int]] = set()
    for variant in family:
        blocks = variant.blocks
        for slots, all_in_ram, numbers in cuts(blocks, placement):
            fitting = [
                resident
                for resident in numbers
                if (slots, all_in_ram, resident) not in taken and blocks.fits(resident, slots, all_in_ram, limits)
            ]
            taken.update((slots, all_in_ram, resident) for resident in fitting)
            if fitting:
                yield _Root(blocks, slots, tuple(fitting), all_in_ram)


def cuts(blocks: TieredBlocks, placement: StreamFrom) -> Iterator[tuple[int, bool, range]]:
    """(slots, whether all streamed blocks rest in RAM, numbers of residents) that are worth looking at."""
    n = blocks.total
    if placement in ("auto", "resident"):
        yield 0, True, range(n, n + 1)
    if placement == "resident":
        return
    if placement in ("pinned", "pageable"):
        streams = [True]
    elif placement == "disk" or blocks.on_host:  # on a CPU a copy of a block in RAM wins nothing over the file
        streams = [False]
    else:
        streams = [True, False]
    # With no more blocks than slots, streaming takes the memory of residency: only a fixed placement asks for that.
    spare = 1 if placement == "auto" else 0
    for slots in SLOT_COUNTS:
        for all_in_ram in streams:
            yield slots, all_in_ram, range(n - slots - spare + 1)


def _placed(box: _Box) -> StagePlan:
    """The plan of a point."""
    root, blocks = box.root, box.root.blocks
    resident = root.residents[box.least[0]]
    ram = blocks.total if root.all_in_ram else resident + box.least[1]
    pinned = min(resident + box.least[2], ram)
    placements = [Placement.DISK] * blocks.total
    for rank, index in enumerate(blocks.order[:ram]):
        placements[index] = (
            Placement.GPU if rank < resident else Placement.PINNED if rank < pinned else Placement.PAGEABLE
        )
    return replace(
        blocks.bare, block_placements=tuple(placements), slots=root.slots, prefetch_depth=max(root.slots - 1, 0)
    )
