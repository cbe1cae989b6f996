"""Who waits for whom: what compute stands still for in one round over a stage's blocks, by its time line."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.passages import passages
from lowmem_flux2.planning.plan import Placement, StagePlan
from lowmem_flux2.planning.stage_work import StageWork
from lowmem_flux2.planning.timeline import ROUNDS_SIMULATED, Span, simulate


class Round(NamedTuple):
    """All spans up to the end of a round in which copies for the next one are already made; when it begins and ends.

    ``waits_ns``: what compute waits in it, for "the disk" and for "copies", the longest first; none that are 0.
    """

    spans: list[Span]
    start: int
    end: int
    waits_ns: dict[str, float]


def steady_round(stage: StagePlan, work: StageWork, hardware: Hardware) -> Round:
    """Of a stage that streams blocks. The only round, where there is one."""
    spans: list[Span] = []
    rounds = min(work.rounds, ROUNDS_SIMULATED + 1)
    ways = passages(stage, work.block_bytes, hardware, work.file_form)
    line = simulate(ways, work.compute_ns, work.between_ns, stage.slots, rounds, spans)
    drawn = max(rounds - 1, 1)
    blocks = len(work.block_bytes)
    waits = {"the disk": 0.0, "copies": 0.0}
    before = spans[blocks * (drawn - 1) - 1 : blocks * drawn] if drawn > 1 else [_nothing(), *spans[:blocks]]
    for last, span in pairwise(before):
        idle = span.compute[0] - last.compute[1] - (work.between_ns if span.round != last.round >= 0 else 0)
        is_read = stage.block_placements[span.block] is Placement.DISK and (
            hardware.device == "cpu" or span.copy[0] == span.read[1] > span.read[0]
        )
        waits["the disk" if is_read else "copies"] += max(idle, 0)
    ordered = sorted(waits.items(), key=lambda each: -each[1])
    return Round(spans, line.total_ns(drawn - 1), line.total_ns(drawn), {who: idle for who, idle in ordered if idle})


def _nothing() -> Span:
    return Span(-1, -1, (0, 0), (0, 0), (0, 0))
