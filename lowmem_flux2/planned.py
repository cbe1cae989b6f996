"""``lowmem-flux2 plan``: what would run, explained or as JSON; of a prompt file, each group of lines of one plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowmem_flux2.arguments import Asked, read_prompts, resolve, selection_of
from lowmem_flux2.flags import FitFlags, RequestFlags
from lowmem_flux2.planning.alternatives import alternatives_of, shown
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.improvements import improvements_of
from lowmem_flux2.planning.job import plan_job
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.preparing import cache_of, prepared_of, room_warning


def print_plans(
    flags: RequestFlags, fit: FitFlags, cache: Path | None, out: Console, err: Console, *, as_json: bool, pareto: bool
) -> None:
    """Plan, and print it. JSON of a prompt file whose lines share no plan is an array.

    Raises:
        UsageError, DoesNotFit: as ``generate`` would.
    """
    plans = _plans(flags, fit, cache)
    rooms = (room_warning(made, cache_of(cache)) for asked, made in plans if asked.machine.detected)
    for warning in filter(None, rooms):
        err.print(warning, style="yellow", soft_wrap=True)
    if as_json:
        found = [
            made.to_json() | (alternatives_of(made, asked.source.spec, asked.selection).to_json() if pareto else {})
            for asked, made in plans
        ]
        sys.stdout.write(json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n")
        return
    for number, (asked, made) in enumerate(plans, 1):
        if len(plans) > 1:
            lines = f"{len(asked.request.prompts)} line{'s' if len(asked.request.prompts) > 1 else ''}"
            out.print(f"{number} of {len(plans)}: {lines} of {flags.prompt_file}")
        out.print(explain(made, asked.source.spec, improvements_of(made, asked.source.spec, asked.selection)))
        if pareto:
            out.print(shown(alternatives_of(made, asked.source.spec, asked.selection)))


def _plans(flags: RequestFlags, fit: FitFlags, cache: Path | None) -> Sequence[tuple[Asked, Plan]]:
    """Each job and its plan."""
    selection = selection_of(fit)
    if flags.prompt_file is None:
        prompts = read_prompts(flags.prompt, None)
        several = [resolve(flags, fit, selection, prompts, without_prompt="(no prompt)", cache=cache)]
    else:
        from lowmem_flux2.batch_request import batch_request  # what it imports is not needed without a file

        groups = batch_request(flags, fit, selection, None, {}, cache, to_plan=True).groups
        several = [group.asked for group in groups]
    ready = prepared_of(several[0].source, cache_of(cache))
    return [
        (asked, plan_job(asked.source, asked.machine, asked.request, asked.selection, prepared=ready))
        for asked in several
    ]
