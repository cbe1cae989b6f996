"""What a stage's choices cost in fidelity: the planner's price list, from formats and step caches."""

from __future__ import annotations

from math import hypot

from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.step_caches import fidelity_of_cache, parse_step_cache


def fidelity_of(stage: StagePlan, steps: int) -> tuple[float, str]:
    """Expected relative error of the stage's result against the checkpoint's own weights with every step computed, and
    where it is from. Independent errors add in squares."""
    fmt = FORMATS[stage.weight_format]
    error, provenance = fidelity_of_cache(parse_step_cache(stage.step_cache), steps)
    if not error:
        return fmt.weight_error, fmt.provenance
    return hypot(fmt.weight_error, error), f"{fmt.provenance}; {provenance}"
