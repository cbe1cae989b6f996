"""What this version's executor can carry out. The planner may plan more; ``generate`` refuses that, and says why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from lowmem_flux2.planning.formats import FORMATS, GGUF, MIXED
from lowmem_flux2.planning.plan import StagePlan


@dataclass(frozen=True, slots=True)
class Support:
    """Names of the weight formats that the executor runs: those whose library is installed."""

    weight_formats: frozenset[str]

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
        return tuple(lacks)

    def missing_of(self, stages: Iterable[StagePlan]) -> tuple[str, ...]:
        """What is missing for any of the stages, each thing once."""
        return tuple(dict.fromkeys(word for stage in stages for word in self.missing(stage)))


LIBRARY_OF = {"nf4": "bitsandbytes", MIXED: "bitsandbytes", GGUF: "gguf"}
"""Formats that run only where a library of an extra is installed."""
EXTRA_OF = {"nf4": "cuda", MIXED: "cuda", GGUF: "gguf"}


def installed() -> Support:
    """What the executor can do with the libraries that are installed here; looks for them without importing any."""
    formats = {name for name in FORMATS if name not in LIBRARY_OF or find_spec(LIBRARY_OF[name]) is not None}
    return Support(weight_formats=frozenset(formats))


SUPPORTED = installed()
EVERYTHING = Support(weight_formats=frozenset(FORMATS))
