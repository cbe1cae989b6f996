"""What this version's executor can carry out. The planner may plan more; ``generate`` refuses that, and says why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from lowmem_flux2.planning.formats import FORMATS, GGUF
from lowmem_flux2.planning.plan import StagePlan
from lowmem_flux2.planning.step_caches import KINDS, OFF


@dataclass(frozen=True, slots=True)
class Support:
    """Names of the weight formats and kinds of step caches that the executor runs, and the switches it honours."""

    weight_formats: frozenset[str]
    step_caches: frozenset[str]
    chunk_tokens: bool

    def missing(self, stage: StagePlan) -> tuple[str, ...]:
        """What the stage needs that is not there, in words; empty when it can run."""
        lacks = []
        if stage.weight_format not in self.weight_formats:
            library = LIBRARY_OF.get(stage.weight_format)
            extra = EXTRA_OF.get(stage.weight_format)
            remedy = (
                f" (needs {library}, which is not installed: pip install 'lowmem-flux2[{extra}]')" if library else ""
            )
            lacks.append(f"{stage.component} weights in {stage.weight_format}{remedy}")
        if stage.step_cache.partition(":")[0] not in self.step_caches:
            lacks.append(f"step cache {stage.step_cache}")
        if stage.chunk_tokens and not self.chunk_tokens:
            lacks.append(f"token chunks of {stage.chunk_tokens}")
        return tuple(lacks)

    def missing_of(self, stages: Iterable[StagePlan]) -> tuple[str, ...]:
        """What is missing for any of the stages, each thing once."""
        return tuple(dict.fromkeys(word for stage in stages for word in self.missing(stage)))


STEP_CACHES = frozenset((OFF, *KINDS))
LIBRARY_OF = {"nf4": "bitsandbytes", GGUF: "gguf"}
"""Formats that run only where a library of an extra is installed."""
EXTRA_OF = {"nf4": "cuda", GGUF: "gguf"}


def installed() -> Support:
    """What the executor can do with the libraries that are installed here; looks for them without importing any."""
    formats = {name for name in FORMATS if name not in LIBRARY_OF or find_spec(LIBRARY_OF[name]) is not None}
    return Support(weight_formats=frozenset(formats), step_caches=STEP_CACHES, chunk_tokens=True)


SUPPORTED = installed()
EVERYTHING = Support(weight_formats=frozenset(FORMATS), step_caches=STEP_CACHES, chunk_tokens=True)
