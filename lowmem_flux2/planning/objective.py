"""What a plan is judged by. Less is better; each number is one that more memory or a faster machine can only lower.

    quality   fidelity error, then tiles, then effort
    balanced  effort x (1 + fidelity error / ERROR_WORTH_DOUBLE_TIME)
    speed     time, then effort
    memory    peak VRAM, then peak RAM, then as quality

Effort is time and a part of what the link and the disk do meanwhile: traffic is never quite free, even hidden behind
compute. Effort and time are whole numbers (of twentieths of a nanosecond, of microseconds), so that rounding never
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.stage_work import block_sizes
from lowmem_flux2.planning.timeline import nanoseconds
from lowmem_flux2.planning.workload import Preference

ERROR_WORTH_DOUBLE_TIME = 0.035
"""``balanced`` takes weights with this relative error only where they halve the effort: int8 (0.0095) where they save
21 % of it, nf4 (0.092) instead of int8 where they save 65 %. A policy, not a measurement."""
_TIME, _LOAD, _READ, _COPY = 20, 1, 8, 2
"""In effort, a second of loading counts as 0.05 more, of reading blocks again as 0.4, of copying them again as 0.1:
nothing is loaded that may as well be streamed once, and nothing read again at each step that may as well stay in
memory, even in a run of four. A policy, not a measurement."""


def effort(time_ns: int, load_ns: int, reread_ns: int, recopy_ns: int) -> int:
    """Of one stage, in twentieths of a nanosecond."""
    return _TIME * time_ns + _LOAD * load_ns + _READ * reread_ns + _COPY * recopy_ns


def time_then_effort(time_ns: int, load_ns: int, reread_ns: int, recopy_ns: int) -> int:
    """Both as one number: whole microseconds, and effort in the 96 bits below."""
    return (time_ns // 1000 << 96) + effort(time_ns, load_ns, reread_ns, recopy_ns)


def time_of(value: int) -> int:
    """Nanoseconds of a ``time_then_effort``, to the microsecond."""
    return (value >> 96) * 1000


def effort_of(stage: StagePlan) -> int:
    return effort(*_lanes_ns(stage))


def time_then_effort_of(stage: StagePlan) -> int:
    return time_then_effort(*_lanes_ns(stage))


def _lanes_ns(stage: StagePlan) -> tuple[int, int, int, int]:
    cost, again = stage.cost, stage.cost.rounds - 1
    reads, copies = (round(lane_s * 1e9) // cost.rounds for lane_s in (cost.read_s, cost.copy_s))
    return round(cost.time_s * 1e9), round(cost.load_s * 1e9), again * reads, again * copies


def fidelity_error(errors: Sequence[float]) -> float:
    """Of a run: independent errors of its stages add in squares."""
    return float(sum(error**2 for error in errors) ** 0.5)


def balance(effort: int, errors: Sequence[float]) -> float:
    """What ``balanced`` minimizes, over the stages of a run."""
    return effort * (1 + fidelity_error(errors) / ERROR_WORTH_DOUBLE_TIME)


def unread(stage: StagePlan, model: ModelSpec, hardware: Hardware) -> int:
    """Effort of reading the bytes that a quantized format saves at the first read, once.

    ``balanced`` adds it, so that the first read, which is once a start, and from a warm page cache nothing, is no
    reason for coarser weights. They had to be read whole, too, when they were prepared.
    """
    plain = StagePlan.bare(stage.stage, stage.compute_dtype, stage.compute_dtype)
    saved = sum(block_sizes(plain, model)) - sum(block_sizes(stage, model))
    return _TIME * nanoseconds(max(saved, 0), hardware.load_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Objective:
    """Orders whole runs: the least ``rating`` is the best."""

    prefer: Preference
    model: ModelSpec
    hardware: Hardware

    def rating(self, stages: Sequence[StagePlan]) -> tuple[float, ...]:
        """Of the three stages of a plan."""
        errors = [stage.cost.fidelity_error for stage in stages]
        efforts = sum(effort_of(stage) for stage in stages)
        if self.prefer == "balanced":
            return (balance(efforts + sum(unread(stage, self.model, self.hardware) for stage in stages), errors),)
        if self.prefer == "speed":
            return (sum(round(stage.cost.time_s * 1e9) // 1000 for stage in stages), efforts)
        faithful = (fidelity_error(errors), any(stage.tile_px for stage in stages), efforts)
        if self.prefer == "quality":
            return faithful
        vram = max(stage.cost.peak_vram_bytes for stage in stages)
        return (vram, max(stage.cost.peak_ram_bytes for stage in stages), *faithful)
