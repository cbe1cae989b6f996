"""Models, machines, workloads and support that the planning tests share. No torch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import get_args

from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.formats import PLAIN_FORMATS
from lowmem_flux2.planning.hardware import Hardware, load_profile
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.references import Reference
from lowmem_flux2.planning.selection import Selection, with_ram_for
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.support import EVERYTHING, Support
from lowmem_flux2.planning.workload import Preference, Workload, make_request, workload_of
from lowmem_flux2.units import GIB

DEV, KLEIN_4B, KLEIN_9B = MODELS = ("flux2-dev", "flux2-klein-4b", "flux2-klein-9b")
KLEIN_BASE = "flux2-klein-base-4b"
SUPPORTED = EVERYTHING
"""This version with every library: what is planned here must not depend on what is installed."""
PREFERENCES: tuple[Preference, ...] = get_args(Preference)
UNQUANTIZED = replace(SUPPORTED, weight_formats=frozenset(PLAIN_FORMATS))
"""A version that runs no quantized format."""
plan_supported = partial(make_plan, support=SUPPORTED)


@cache
def spec(name: str) -> ModelSpec:
    return spec_from_configs(name, name, shipped_configs(name))


@cache
def machine(profile: str, ram_gib: int | None = None) -> Hardware:
    """A shipped profile, with ``--max-ram`` where given."""
    hardware = load_profile(profile)
    return hardware if ram_gib is None else with_ram_for(hardware, ram_gib * GIB)


def work(
    name: str, px: int = 1024, images: int = 1, prompts: int = 1, steps: int | None = None, references: int = 0
) -> Workload:
    model = spec(name)
    request = make_request(
        model,
        ("x",) * prompts,
        width=px,
        height=px,
        num_images_per_prompt=images,
        num_inference_steps=steps,
        references=(Reference("picture", 1024, 768),) * references,
    )
    return workload_of(request, model)


def plan_for(
    name: str,
    profile: str,
    ram_gib: int | None = None,
    *,
    px: int = 1024,
    images: int = 1,
    prompts: int = 1,
    selection: Selection | None = None,
    support: Support = SUPPORTED,
) -> Plan:
    return make_plan(
        spec(name),
        work(name, px, images, prompts),
        machine(profile, ram_gib),
        selection or Selection(),
        profile=profile,
        support=support,
    )
