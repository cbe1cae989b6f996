"""The time line of a stage that streams blocks: compute, copies to the device and disk reads as three lanes.

    disk     |read 3 |read 5       |                a disk block passes disk -> ring -> slot
    copy     |2 |3   |4 |5         |                one copy at a time, in the order of use
    compute  |1      |2      |3    |                a block starts when its copy is done and the one before it computed

Every instant is the maximum of earlier ones plus a duration, so that no duration that shrinks, and no edge that goes
away, can make anything later: the planner's bounds (``search``) and its monotony rest on this. Durations are whole
nanoseconds: sums are exact, and equal plans cost exactly the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

ROUNDS_SIMULATED = 3
"""The first round starts with empty slots. In a steady state every round is alike: the second nearly always, the third
in each of 300,000 random cases (tests draw more)."""


class Way(IntEnum):
    """How a block comes to its use."""

    RESIDENT = 0  # it is there
    PINNED = 1  # one copy, which the host issues ahead
    PAGEABLE = 2  # the worker thread copies: it waits for the slot, and is held until the copy is done
    DISK = 3  # the worker thread reads into the ring as soon as the ring's entry has been copied; then one copy


class Passage(NamedTuple):
    """A block's way and what it takes, in nanoseconds; ``read_ns`` is 0 but for what is read first."""

    way: Way
    read_ns: int
    copy_ns: int

    @property
    def packed(self) -> tuple[int, float, float]:
        """The same as ``simulate`` goes through it fastest: floats hold whole nanoseconds exactly for 104 days."""
        return int(self.way), float(self.read_ns), float(self.copy_ns)


class Span(NamedTuple):
    """One block's use in a simulated round: when its read, copy and compute began and ended (equal where none)."""

    round: int
    block: int
    read: tuple[float, float]
    copy: tuple[float, float]
    compute: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """``first_ns``: the first round; ``second_ns``: the one after it; ``steady_ns``: each further one."""

    first_ns: int
    second_ns: int
    steady_ns: int

    def total_ns(self, rounds: int) -> int:
        """Length of so many rounds."""
        if rounds < 2:
            return rounds * self.first_ns
        return self.first_ns + self.second_ns + (rounds - 2) * self.steady_ns


def nanoseconds(amount: float, per_second: float) -> int:
    """Whole nanoseconds that ``amount`` takes, rounded up: never less for more, never more for a higher rate."""
    return math.ceil(amount / per_second * 1e9)


def simulate(
    passages: Sequence[tuple[int, float, float]],
    compute_ns: Sequence[float],
    between_ns: float,
    slots: int,
    rounds: int = ROUNDS_SIMULATED,
    spans: list[Span] | None = None,
) -> Timeline:
    """Run up to ``rounds`` rounds over the blocks.

    A streamed use takes the slot, and from disk the ring's entry, of the use ``slots`` before it: its copy may start
    when that use has been computed, its read when that use has been copied. The copy engine and the worker thread do
    one thing at a time, in the order of use.

    Args:
        passages: of each block in the order of use, packed or not.
        compute_ns: of each block; ``between_ns`` is what each round computes besides.
        slots: device buffers; at least 1 where a block is streamed.
        rounds: 1 where there is only one; then ``second_ns`` and ``steady_ns`` are 0.
        spans: filled with every use of all rounds, in order.
    """
    worker = copied = computed = start = 0.0
    slot = 0
    computed_of, copied_of = [0.0] * slots, [0.0] * slots
    floor = sum(compute_ns) + between_ns
    uses = list(zip(passages, compute_ns, strict=True))
    lengths: list[int] = []
    for number in range(rounds):
        for (way, read_ns, copy_ns), compute in uses:
            ready = computed
            if way:
                ready = computed_of[slot]
                if copied > ready:
                    ready = copied
                if way == 1:
                    copied = ready + copy_ns
                elif way == 3:
                    if copied_of[slot] > worker:
                        worker = copied_of[slot]
                    worker += read_ns
                    if worker > ready:
                        ready = worker
                    copied = ready + copy_ns
                else:
                    if worker > ready:
                        ready = worker
                    copied = worker = ready + copy_ns
                copied_of[slot] = copied
                if copied > computed:
                    computed = copied
                computed += compute
                computed_of[slot] = computed
                slot += 1
                if slot == slots:
                    slot = 0
            else:
                computed += compute
            if spans is not None:
                read = (worker - read_ns, worker) if way == 3 else (ready, ready)
                block = len(spans) - number * len(uses)
                spans.append(Span(number, block, read, (ready, ready + copy_ns), (computed - compute, computed)))
        computed += between_ns
        lengths.append(int(computed - start))
        start = computed
        if number == 1 and lengths[1] == floor and spans is None:
            break  # nothing waits any more
    return Timeline(lengths[0], lengths[1], lengths[-1]) if len(lengths) > 1 else Timeline(lengths[0], 0, 0)
