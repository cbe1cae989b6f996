"""Memory as bars, and a step's time line as lanes, in text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

from lowmem_flux2.planning.cost import READ_BUFFER_BYTES
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Placement, Plan, StagePlan
from lowmem_flux2.planning.stage_work import stage_work
from lowmem_flux2.planning.step_caches import OFF
from lowmem_flux2.planning.waits import steady_round
from lowmem_flux2.units import GIB, format_seconds

BAR_WIDTH, LEAST_BAR_WIDTH = 32, 24
LANE_WIDTH, LEAST_LANE_WIDTH = 66, 24
MOST_KINDS = 3
"""As many of a bar's largest kinds are named as leave it ``LEAST_BAR_WIDTH``."""
DEVICE_KINDS = (("context", "░"), ("resident", "█"), ("slots", "▓"), ("activations", "▒"), ("margin", "·"))
HOST_KINDS = (("libraries", "░"), ("pinned", "█"), ("pageable", "▓"), ("ring", "▒"), ("passing", "·"))
"""``passing``: what loading passes through, and what the stage takes and leaves."""

Parts = Sequence[tuple[str, str, int]]
"""(kind, mark, bytes)."""


def device_parts(stage: StagePlan) -> Parts:
    """The compute device's memory by kind. On a CPU it is RAM, and begins with the libraries."""
    cost = stage.cost
    live = cost.activation_bytes + cost.workspace_bytes
    held = (cost.resident_bytes, cost.slot_bytes, live, cost.margin_bytes)
    first = cost.peak_ram_bytes - sum(held) if cost.on_host else cost.context_bytes
    kinds = (("libraries", "░"), *DEVICE_KINDS[1:]) if cost.on_host else DEVICE_KINDS
    return [(kind, mark, size) for (kind, mark), size in zip(kinds, (first, *held), strict=True)]


def host_parts(stage: StagePlan) -> Parts:
    """The host's RAM by kind, beside a GPU."""
    cost = stage.cost
    libraries = min(cost.process_bytes + READ_BUFFER_BYTES, cost.host_bytes)
    ring = min(cost.slot_bytes, cost.host_pinned_bytes) if stage.count(Placement.DISK) else 0
    sizes = (
        libraries,
        cost.host_pinned_bytes - ring,
        cost.host_pageable_bytes,
        ring,
        cost.host_bytes - libraries - cost.host_pageable_bytes,
    )
    return [(kind, mark, size) for (kind, mark), size in zip(HOST_KINDS, sizes, strict=True)]


def bars(named: Sequence[tuple[str, Parts]], cap_bytes: int, columns: int) -> list[str]:
    """A line each: a bar as long as its part of the cap, the sum, and the largest kinds in it, in GiB.

    Args:
        columns: that the terminal has; bars are shorter and fewer kinds are named where it is narrow.
    """
    beside = max(8, *(len(name) for name, _ in named)) + len("|| ")
    for kinds in range(MOST_KINDS, 0, -1):
        words = [_largest(parts, kinds) for _, parts in named]
        room = columns - beside - max(map(len, words))
        if room >= LEAST_BAR_WIDTH:
            break
    width = max(min(room, BAR_WIDTH), LEAST_BAR_WIDTH)
    return [
        f"{name:{beside - 3}}|{_bar(parts, cap_bytes, width)}| {each}"
        for (name, parts), each in zip(named, words, strict=True)
    ]


def _largest(parts: Parts, kinds: int) -> str:
    largest = sorted((part for part in parts if part[2]), key=lambda part: -part[2])[:kinds]
    words = ", ".join(f"{kind} {size / GIB:.2f}" for kind, _, size in largest)
    return f"{total_bytes(parts) / GIB:.2f} GiB: {words}"


def _bar(parts: Parts, cap_bytes: int, width: int) -> str:
    ends = [
        min(round(width * end / cap_bytes), width) if cap_bytes else 0
        for end in accumulate((size for *_, size in parts), initial=0)
    ]
    marks = (mark for _, mark, _ in parts)
    drawn = "".join(mark * (end - begin) for mark, (begin, end) in zip(marks, pairwise(ends), strict=True))
    return f"{drawn:{width}}"


def total_bytes(parts: Parts) -> int:
    return sum(size for *_, size in parts)


def legend(parts: Parts) -> str:
    return "  ".join(f"{mark} {kind}" for kind, mark, _ in parts)


def step_lanes(plan: Plan, model: ModelSpec, columns: int = 100) -> list[str]:
    """A denoising step in the steady state: what disk, copies and compute do, side by side, and who waits.

    No line where the plan is to decode alone.

    Args:
        columns: that the terminal has.
    """
    if all(stage.stage != "denoise" for stage in plan.stages):
        return []
    stage, hardware = plan.stage("denoise"), plan.hardware
    work = stage_work(stage, model, plan.workload, hardware)
    spans, start, end, waits = steady_round(stage, work, hardware)
    length = end - start
    batches = -(-plan.workload.num_images // stage.batch_size)
    passes = f" of each of {batches} batches" if batches > 1 else ""
    kind = "step" if stage.step_cache == OFF else "computed step"
    lines = [f"denoise, one {kind}{passes}: {format_seconds(length / 1e9)}"]
    if not stage.streamed:
        return [f"{lines[0]}, all of it compute: every block is resident"]
    on_host = hardware.device == "cpu"
    from_disk = [placement is Placement.DISK for placement in stage.block_placements]
    lanes = {
        "disk": [span.copy if on_host else span.read for span in spans if from_disk[span.block]],
        "copy": [span.copy for span in spans if not (on_host and from_disk[span.block])],
        "compute": [span.compute for span in spans],
    }
    drawn = []
    for (name, busy), mark in zip(lanes.items(), "▒▓█", strict=True):
        cut = [(max(begin, start), min(stop, end)) for begin, stop in busy]
        total = sum(max(stop - begin, 0) for begin, stop in cut)
        if total:
            share = f"{format_seconds(total / 1e9)} {total / length:4.0%}"
            drawn.append((name, cut, mark, share))
    room = columns - len("compute || ") - max(len(share) for *_, share in drawn)
    width = max(min(room, LANE_WIDTH), LEAST_LANE_WIDTH)
    lines += [f"{name:8}|{_lane(cut, start, end, mark, width)}| {share}" for name, cut, mark, share in drawn]
    if sum(waits.values()) > 0.02 * length:
        whom = ", ".join(
            f"{format_seconds(idle / 1e9)} for {who}" for who, idle in waits.items() if idle > 0.002 * length
        )
        lines.append(f"{'':8} compute waits: {whom}{'; with one slot nothing comes ahead' if stage.slots == 1 else ''}")
    else:
        lines.append(f"{'':8} nothing waits: copies hide behind compute")
    return lines


def _lane(busy: Iterable[tuple[float, float]], start: int, end: int, mark: str, width: int) -> str:
    """A column is marked where the lane is busy for at least half of it, and dotted where for less."""
    columns = [0.0] * width
    scale = width / (end - start)
    for begin, stop in busy:
        if stop <= begin:
            continue
        first, last = (begin - start) * scale, (stop - start) * scale
        for column in range(int(first), min(int(last) + 1, width)):
            columns[column] += max(min(last, column + 1) - max(first, column), 0.0)
    return "".join(mark if share >= 0.5 else "·" if share else " " for share in columns)
