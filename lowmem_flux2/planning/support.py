"""What this version's executor can carry out. The planner may plan more; ``generate`` refuses that, and says why."""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import StagePlan


@dataclass(frozen=True, slots=True)
class Support:
    """Names of the weight formats and step caches that the executor runs, and the switches it honours."""

    weight_formats: frozenset[str]
    step_caches: frozenset[str]
    chunk_tokens: bool

    def missing(self, stage: StagePlan) -> tuple[str, ...]:
        """What the stage needs that is not there, in words; empty when it can run."""
        lacks = []
        if stage.weight_format not in self.weight_formats:
            lacks.append(f"{stage.component} weights in {stage.weight_format}")
        if stage.step_cache not in self.step_caches:
            lacks.append(f"step cache {stage.step_cache}")
        if stage.chunk_tokens and not self.chunk_tokens:
            lacks.append(f"token chunks of {stage.chunk_tokens}")
        return tuple(lacks)


SUPPORTED = Support(
    weight_formats=frozenset({"fp32", "fp16", "bf16"}), step_caches=frozenset({"off"}), chunk_tokens=False
)
EVERYTHING = Support(weight_formats=frozenset(FORMATS), step_caches=frozenset({"off"}), chunk_tokens=True)
