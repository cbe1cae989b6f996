"""The time line against an independent simulation of events, and the laws that the planner's bounds rest on."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_flux2.planning.timeline import ROUNDS_SIMULATED, Passage, Span, Timeline, Way, nanoseconds, simulate

TIMES = st.integers(1, 60)
RESIDENT = Passage(Way.RESIDENT, 0, 0)
PASSAGES = st.one_of(
    st.just(RESIDENT),
    st.builds(Passage, st.just(Way.PINNED), st.just(0), TIMES),
    st.builds(Passage, st.just(Way.PAGEABLE), st.just(0), TIMES),
    st.builds(Passage, st.just(Way.DISK), st.integers(1, 240), TIMES),
)
BLOCKS = st.lists(st.tuples(PASSAGES, TIMES), min_size=1, max_size=12)
SLOTS = st.integers(1, 5)
BETWEEN = st.sampled_from([0, 0, 7, 40])


def events(passages: Sequence[Passage], compute_ns: Sequence[int], slots: int, rounds: int) -> list[int]:
    """Length of each round, by discrete events.

    Written from the streamer's rules, not from the recurrence: the worker thread (who reads the disk and carries
    pageable copies), the copy engine and the compute stream each take their next task, in the order of use, as soon as
    they are free and what the task needs is there.
    """
    count = len(passages)
    uses = range(rounds * count)
    streamed = [use for use in uses if passages[use % count].way is not Way.RESIDENT]
    through_worker = [use for use in streamed if passages[use % count].way is not Way.PINNED]
    before = dict(zip(streamed[slots:], streamed, strict=False))  # who had the slot, and the ring's entry
    done: dict[str, set[int]] = {"read": set(), "copy": set(), "compute": set()}
    begun: dict[str, set[int]] = {"read": set(), "copy": set(), "compute": set()}
    finished = [0] * len(uses)
    queue: list[tuple[int, str, int]] = []
    now = 0

    def next_of(kind: str, tasks: Sequence[int]) -> int | None:
        """The first task that is not begun, where the resource is free."""
        if begun[kind] != done[kind]:
            return None
        return next((task for task in tasks if task not in begun[kind]), None)

    def worker_task() -> int | None:
        """What the worker thread has in hand: its first task that is not over (a pageable one is, when copied)."""
        over = {Way.DISK: done["read"], Way.PAGEABLE: done["copy"]}
        return next((task for task in through_worker if task not in over[passages[task % count].way]), None)

    def begin(kind: str, task: int, lasts: int) -> None:
        begun[kind].add(task)
        heapq.heappush(queue, (now + lasts, kind, task))

    while True:
        task = worker_task()
        is_read = task is not None and passages[task % count].way is Way.DISK and task not in begun["read"]
        if task is not None and is_read and (task not in before or before[task] in done["copy"]):
            begin("read", task, passages[task % count].read_ns)
        task = next_of("copy", streamed)
        if task is not None and (task not in before or before[task] in done["compute"]):
            way = passages[task % count].way
            is_ready = {Way.PINNED: True, Way.DISK: task in done["read"], Way.PAGEABLE: worker_task() == task}[way]
            if is_ready:
                begin("copy", task, passages[task % count].copy_ns)
        task = next_of("compute", uses)
        if task is not None and (passages[task % count].way is Way.RESIDENT or task in done["copy"]):
            begin("compute", task, compute_ns[task % count])
            continue
        if not queue:
            break
        now, kind, task = heapq.heappop(queue)
        done[kind].add(task)
        finished[task] = now
    ends = [0, *finished[count - 1 :: count]]
    return [end - start for start, end in pairwise(ends)]


@settings(deadline=None, max_examples=200)
@given(BLOCKS, SLOTS, BETWEEN)
def test_it_agrees_with_a_simulation_of_events(blocks: list[tuple[Passage, int]], slots: int, between: int) -> None:
    passages, compute = zip(*blocks, strict=True)
    found = simulate(passages, compute, between, slots)
    # What is computed between the rounds is a resident block of its own.
    rounds = events([*passages, RESIDENT], [*compute, between], slots, ROUNDS_SIMULATED)
    assert [found.first_ns, found.second_ns, found.steady_ns] == rounds
    assert [found.total_ns(number) for number in range(4)] == [0, *(sum(rounds[: number + 1]) for number in range(3))]


@settings(deadline=None, max_examples=300)
@given(BLOCKS, SLOTS, BETWEEN)
def test_the_third_round_is_the_steady_one(blocks: list[tuple[Passage, int]], slots: int, between: int) -> None:
    passages, compute = zip(*blocks, strict=True)
    found, longer = simulate(passages, compute, between, slots), simulate(passages, compute, between, slots, rounds=12)
    assert longer.steady_ns == found.steady_ns
    assert found.steady_ns <= found.second_ns


@given(BLOCKS, SLOTS, BETWEEN)
def test_a_step_takes_at_least_what_each_lane_does(blocks: list[tuple[Passage, int]], slots: int, between: int) -> None:
    passages, compute = zip(*blocks, strict=True)
    found = simulate(passages, compute, between, slots)
    copies, reads = (sum(passage[field] for passage in passages) for field in (2, 1))
    assert found.steady_ns >= max(sum(compute) + between, copies, reads)
    assert found.first_ns <= sum(compute) + between + copies + reads


@given(st.lists(st.tuples(st.builds(Passage, st.just(Way.PINNED), st.just(0), TIMES), TIMES), min_size=1, max_size=12))
def test_one_slot_hides_nothing(blocks: list[tuple[Passage, int]]) -> None:
    """The next copy waits until the slot's block is computed; only resident blocks in between would give it cover."""
    passages, compute = zip(*blocks, strict=True)
    assert simulate(passages, compute, 0, 1).steady_ns == sum(compute) + sum(passage.copy_ns for passage in passages)


def test_one_slot_still_reads_the_next_disk_block_while_one_computes() -> None:
    disk = Passage(Way.DISK, 50, 10)
    assert simulate([disk] * 4, [60] * 4, 0, 1).steady_ns == 4 * (60 + 10)
    assert simulate([disk] * 4, [20] * 4, 0, 1).steady_ns == 4 * (50 + 10)


def test_a_slow_disk_block_among_fast_ones_hides_behind_more_slots() -> None:
    passages = [Passage(Way.DISK, 250, 10), *[Passage(Way.PINNED, 0, 10)] * 4]
    one, two, three = (simulate(passages, [70] * 5, 0, slots).steady_ns - 5 * 70 for slots in (1, 2, 3))
    assert one > two > 0 == three


@given(st.lists(TIMES, min_size=1, max_size=12), BETWEEN)
def test_without_copies_a_step_is_its_compute(compute: list[int], between: int) -> None:
    length = sum(compute) + between
    assert simulate([RESIDENT] * len(compute), compute, between, 0) == Timeline(length, length, length)


# ------------------------------------------------------------------------------------- what the planner's bounds need


@given(BLOCKS, SLOTS, BETWEEN, st.integers(1, 40), st.data())
def test_nothing_that_takes_less_makes_a_run_longer(
    blocks: list[tuple[Passage, int]], slots: int, between: int, rounds: int, data: st.DataObject
) -> None:
    passages, compute = zip(*blocks, strict=True)
    faster = [
        passage._replace(
            read_ns=data.draw(st.integers(0, passage.read_ns)), copy_ns=data.draw(st.integers(0, passage.copy_ns))
        )
        for passage in passages
    ]
    less = [data.draw(st.integers(0, time)) for time in compute]
    whole = simulate(passages, compute, between, slots).total_ns(rounds)
    assert simulate(faster, compute, between, slots).total_ns(rounds) <= whole
    assert simulate(passages, less, between, slots).total_ns(rounds) <= whole


@given(BLOCKS, SLOTS, BETWEEN, st.integers(1, 40), st.data())
def test_a_block_that_stays_or_is_pinned_never_makes_a_run_longer(
    blocks: list[tuple[Passage, int]], slots: int, between: int, rounds: int, data: st.DataObject
) -> None:
    passages, compute = zip(*blocks, strict=True)
    index = data.draw(st.integers(0, len(blocks) - 1))
    whole = simulate(passages, compute, between, slots).total_ns(rounds)
    pinned = RESIDENT if passages[index] == RESIDENT else Passage(Way.PINNED, 0, passages[index].copy_ns)
    for better in (RESIDENT, pinned):
        others = [*passages[:index], better, *passages[index + 1 :]]
        assert simulate(others, compute, between, slots).total_ns(rounds) <= whole


@given(BLOCKS, SLOTS, BETWEEN, st.integers(1, 40))
def test_more_slots_never_make_a_run_longer(
    blocks: list[tuple[Passage, int]], slots: int, between: int, rounds: int
) -> None:
    passages, compute = zip(*blocks, strict=True)
    more, fewer = (simulate(passages, compute, between, number).total_ns(rounds) for number in (slots + 1, slots))
    assert more <= fewer


@given(st.integers(0, 10**12), st.integers(0, 10**6), st.floats(1e6, 1e12), st.floats(1, 2))
def test_nanoseconds_never_shrink_with_more_bytes_nor_grow_with_the_rate(
    size: int, more: int, rate: float, faster: float
) -> None:
    assert nanoseconds(size, rate) <= nanoseconds(size + more, rate)
    assert nanoseconds(size, rate) >= nanoseconds(size, rate * faster)
    assert nanoseconds(size, rate) == pytest.approx(1e9 * size / rate, rel=1e-12, abs=1)


@given(BLOCKS, SLOTS, BETWEEN)
def test_spans_tell_what_each_lane_does_and_never_overlap(
    blocks: list[tuple[Passage, int]], slots: int, between: int
) -> None:
    passages, compute = zip(*blocks, strict=True)
    spans: list[Span] = []
    found = simulate(passages, compute, between, slots, spans=spans)
    assert [span.block for span in spans[: len(passages)]] == list(range(len(passages)))
    for lane in ("read", "copy", "compute"):
        busy = [getattr(span, lane) for span in spans]
        busy = [span for span in busy if span[1] > span[0]]
        assert all(before[1] <= after[0] for before, after in pairwise(busy))
    for span in spans:
        passage = passages[span.block]
        assert span.read[1] - span.read[0] == passage.read_ns
        assert span.copy[1] - span.copy[0] == passage.copy_ns
        assert span.compute[1] - span.compute[0] == compute[span.block]
        if passage.way is not Way.RESIDENT:
            assert span.read[1] <= span.copy[0] and span.copy[1] <= span.compute[0]
    assert spans[len(passages) - 1].compute[1] == found.first_ns - between
