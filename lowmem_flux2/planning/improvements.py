"""What would help: a little more RAM, a smaller picture, another preference; each planned for real."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import get_args

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.changes import Change
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Placement, Plan, Stage
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.support import SUPPORTED, Support
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.units import GIB, format_seconds

MORE_RAM_GIB = (4, 8, 16, 32)
SIDES_PX = (768, 512)
WORTH = 0.1
"""More RAM helps where it saves this part of the time at no loss of fidelity, or wins fidelity at no such loss of time;
another preference where it saves as much, or is more faithful at any time."""


def improvements_of(
    plan: Plan, model: ModelSpec, selection: Selection, support: Support = SUPPORTED
) -> tuple[str, ...]:
    """The least change of each kind that helps, in words.

    Args:
        plan: just made for ``model`` with ``selection``.
    """
    asked = Change(model, plan.workload, plan.hardware, selection)
    kinds = (_more_ram(plan, asked, support), _smaller(plan, asked, support), _preferences(plan, asked, support))
    return tuple(words for kind in kinds for words in kind)


def _planned(changes: Iterable[Change], plan: Plan, support: Support) -> Iterator[Plan]:
    for change in changes:
        with suppress(DoesNotFit):
            yield change.plan(plan.profile, support)


def _more_ram(plan: Plan, asked: Change, support: Support) -> Iterator[str]:
    """The least that helps. More never helps less by the plan's own objective: where the most does not, none is tried,
    and of the others half are passed over each time."""
    if not any(stage.count(Placement.DISK) for stage in plan.stages):
        return  # all weights that are used again are in memory

    def with_more(gib: int) -> Plan | None:
        change = asked.with_ram(plan.limits.ram_bytes + gib * GIB)
        for other in _planned([change], plan, support):
            is_faster = other.time_s <= (1 - WORTH) * plan.time_s and other.fidelity_error <= plan.fidelity_error
            is_better = other.fidelity_error < plan.fidelity_error and other.time_s <= (1 + WORTH) * plan.time_s
            if is_faster or is_better:
                return other
        return None

    low, high = 0, len(MORE_RAM_GIB) - 1
    best = with_more(MORE_RAM_GIB[high])
    while best is not None and low < high:
        middle = (low + high) // 2
        less = with_more(MORE_RAM_GIB[middle])
        low, high, best = (low, middle, less) if less is not None else (middle + 1, high, best)
    if best is not None:
        yield f"+{MORE_RAM_GIB[high]} GiB RAM: {_gain(plan, best)}"


def _smaller(plan: Plan, asked: Change, support: Support) -> Iterator[str]:
    work = plan.workload
    sides = [side for side in SIDES_PX if side * side < work.width * work.height][:1]
    for other in _planned([asked.smaller(side) for side in sides], plan, support):
        streamed = other.stage("denoise").streamed
        held = "" if streamed == plan.stage("denoise").streamed else f", {streamed} blocks streamed"
        yield f"{other.workload.width}x{other.workload.height}: {_gain(plan, other)}{held}"


def _preferences(plan: Plan, asked: Change, support: Support) -> Iterator[str]:
    others: list[Preference] = [prefer for prefer in get_args(Preference) if prefer not in (plan.prefer, "memory")]
    for other in _planned([asked.with_choice("prefer", prefer) for prefer in others], plan, support):
        if other.time_s <= (1 - WORTH) * plan.time_s or other.fidelity_error < plan.fidelity_error:
            yield f"--prefer {other.prefer}: {_gain(plan, other)}"


def _gain(plan: Plan, other: Plan) -> str:
    """What is different: formats, and seconds a step or of the run."""
    names: dict[Stage, str] = {"denoise": "", "encode": "text encoder ", "upsample": "caption upsampling "}
    planned = {stage.stage for stage in plan.stages}
    words = [
        f"{words}{other.stage(name).weight_format} instead of {plan.stage(name).weight_format}"
        for name, words in names.items()
        if name in planned and plan.stage(name).weight_format != other.stage(name).weight_format
    ]
    mine_s, its_s = (each.stage("denoise").cost.run_s / each.workload.steps for each in (plan, other))
    if abs(its_s - mine_s) >= WORTH * mine_s:
        words.append(f"{format_seconds(its_s)} a step instead of {format_seconds(mine_s)}")
    elif abs(other.time_s - plan.time_s) >= WORTH * plan.time_s or not words:
        words.append(f"{format_seconds(other.time_s)} instead of {format_seconds(plan.time_s)}")
    return ", ".join(words)
