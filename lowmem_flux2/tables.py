"""``lowmem-flux2 plan --table``: what would be planned on every card, for every model and size of RAM, as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.hardware import Hardware, load_profile
from lowmem_flux2.planning.plan import Placement, Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.roofline import Roofline, roofline
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.support import SUPPORTED
from lowmem_flux2.planning.workload import make_request, workload_of
from lowmem_flux2.units import GIB

MODELS = ("flux2-dev", "flux2-klein-9b", "flux2-klein-4b")
RAM_SIZES_GIB = (16, 32, 64)
SIDE_PX = 1024
COMMON = (
    "rtx-3060-12gb",
    "rtx-3070-8gb",
    "rtx-4060-8gb",
    "rtx-4060-ti-16gb",
    "rtx-4070-12gb",
    "rtx-4090-24gb",
    "rtx-5070-ti-16gb",
    "rtx-5090-32gb",
)
"""Cards whose rows the README shows at once."""
HEAD = (
    "| card | model | RAM, GiB | transformer, text encoder | blocks VRAM/pinned/pageable/disk | peak VRAM, GiB "
    "| s/step | at least | run, s |\n|---|---|---|---|---|--:|--:|--:|--:|"
)
ABOUT = """\
Predicted, not measured: one picture of 1024x1024 at the model's own steps, `--prefer balanced`, on machines with so
much RAM in all; other figures are the profiles'. *s/step* is a denoising step; *at least* is its roofline: the largest
of its compute, of what must cross the link because VRAM cannot hold it, and of what must be read again because RAM
cannot either (`planning/roofline.py`), with *link* or *disk* where one of those sets it. *run* is everything, loading
from a cold disk included; quantizing the weights, once, comes before the first run."""


@dataclass(frozen=True, slots=True)
class Row:
    """One card with so much RAM, one model; ``plan`` is None where none fits."""

    profile: str
    ram_gib: int
    model: str
    plan: Plan | None
    bounds: Roofline | None

    @property
    def cells(self) -> str:
        """All that follows the size of RAM."""
        if self.plan is None or self.bounds is None:
            return "does not fit | | | | | |"
        encode, denoise = self.plan.stage("encode"), self.plan.stage("denoise")
        by = "" if self.bounds.bound_by == "compute" else f" {self.bounds.bound_by}"
        cells = (
            f"{denoise.weight_format}, {encode.weight_format}",
            "/".join(str(denoise.count(placement)) for placement in Placement),
            f"{self.plan.peak_vram_bytes / GIB:.1f}" if self.plan.peak_vram_bytes else "-",
            f"{denoise.cost.run_s / self.plan.workload.steps:.2f}",
            f"{self.bounds.bound_s:.2f}{by}",
            f"{self.plan.time_s:.0f}",
        )
        return " | ".join(cells) + " |"


def rows(profiles: Iterable[str], models: Sequence[str] = MODELS) -> Iterator[Row]:
    """Each profile with each size of RAM and each model, one picture of 1024x1024 at the model's defaults.

    What is planned does not depend on which libraries are installed here.
    """
    support = replace(SUPPORTED, weight_formats=frozenset(FORMATS))
    for profile in profiles:
        for name in models:
            model = spec_from_configs(name, name, shipped_configs(name))
            work = workload_of(make_request(model, ("a picture",), width=SIDE_PX, height=SIDE_PX), model)
            for gib in RAM_SIZES_GIB:
                hardware = with_ram(load_profile(profile), gib * GIB)
                try:
                    plan = make_plan(
                        model, work, hardware, Selection(), profile=profile, support=support, with_reasons=False
                    )
                except DoesNotFit:
                    yield Row(profile, gib, name, None, None)
                else:
                    yield Row(profile, gib, name, plan, roofline(plan, model))


def with_ram(hardware: Hardware, ram_bytes: int) -> Hardware:
    """The machine with so much RAM in all, of which the same part may be pinned."""
    pinnable = hardware.pinnable_bytes * ram_bytes // hardware.ram_bytes
    return replace(hardware, ram_bytes=ram_bytes, pinnable_bytes=pinnable)


def markdown(found: Iterable[Row]) -> str:
    """A table in which sizes of RAM that make no difference share a line."""
    lines = [HEAD]
    for (profile, model, cells), alike in groupby(found, key=lambda row: (row.profile, row.model, row.cells)):
        sizes = ", ".join(str(row.ram_gib) for row in alike)
        lines.append(f"| {profile} | {model.removeprefix('flux2-')} | {sizes} | {cells}")
    return "\n".join(lines)


def document(profiles: Iterable[str], models: Sequence[str] = MODELS) -> str:
    """What the table says, and the table."""
    return f"# What is planned on which card\n\n{ABOUT}\n\n{markdown(rows(profiles, models))}\n"
