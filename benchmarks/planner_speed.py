"""How long planning takes, over every shipped profile, model and size of RAM, and each preference.

    python benchmarks/planner_speed.py            # prints a table and one JSON line, writes results/planner-speed.json

Each plan is made once to warm caches of code, then REPEATS times; the least of each is taken, as others may use the
machine. ``cpu_ms`` is processor time of this process, ``wall_ms`` what a clock saw. The largest case is dev, 4 images
and 10 reference images; for it, what comes with a plan on request (the front of alternatives and the neighbours, what
would help, the explanation's text) is timed too.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from io import StringIO
from itertools import product
from pathlib import Path
from typing import get_args

from rich.console import Console

from lowmem_flux2.errors import DoesNotFit
from lowmem_flux2.planning.alternatives import alternatives_of
from lowmem_flux2.planning.configs import spec_from_configs
from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.hardware import list_profiles, load_profile
from lowmem_flux2.planning.improvements import improvements_of
from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.planning.planner import make_plan
from lowmem_flux2.planning.references import Reference
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import shipped_configs
from lowmem_flux2.planning.support import EVERYTHING
from lowmem_flux2.planning.workload import Preference, Workload, make_request, workload_of
from lowmem_flux2.report import write_atomically
from lowmem_flux2.tables import MODELS, RAM_SIZES_GIB, with_ram
from lowmem_flux2.units import GIB

REPEATS = 3
GOAL_MS = 50
RESULT = Path(__file__).parent / "results" / "planner-speed.json"


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Least processor and wall time of a few runs, in milliseconds."""
    work()
    cpu, wall = [], []
    for _ in range(REPEATS):
        started, clock = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - started)
        wall.append(time.perf_counter() - clock)
    return {"cpu_ms": 1e3 * min(cpu), "wall_ms": 1e3 * min(wall)}


def job(name: str, images: int = 1, references: int = 0) -> tuple[ModelSpec, Workload]:
    model = spec_from_configs(name, name, shipped_configs(name))
    pictures = (Reference("picture", 1024, 1024),) * references
    request = make_request(model, ("x",), width=1024, height=1024, num_images_per_prompt=images, references=pictures)
    return model, workload_of(request, model)


def measure(
    profile: str, name: str, gib: int, prefer: Preference, images: int = 1, references: int = 0
) -> dict[str, object]:
    model, workload = job(name, images, references)
    hardware = with_ram(load_profile(profile), gib * GIB)
    selection = Selection(prefer=prefer)
    taken = timed(lambda: make_plan(model, workload, hardware, selection, profile=profile, support=EVERYTHING))
    case: dict[str, object] = {"profile": profile, "model": name, "ram_gib": gib, "prefer": prefer}
    case |= {"images": images, "references": references}
    return {**case, **{key: round(value, 2) for key, value in taken.items()}}


def on_request(profile: str, images: int, references: int) -> dict[str, object]:
    """The front and neighbours, what would help, and the text, of dev with 64 GiB."""
    model, workload = job("flux2-dev", images, references)
    hardware, selection = with_ram(load_profile(profile), 64 * GIB), Selection()
    console = Console(width=100, file=StringIO())
    plan = make_plan(model, workload, hardware, selection, profile=profile, support=EVERYTHING)
    helps = improvements_of(plan, model, selection, EVERYTHING)
    works: dict[str, Callable[[], object]] = {
        "plan": lambda: make_plan(model, workload, hardware, selection, profile=profile, support=EVERYTHING),
        "alternatives": lambda: alternatives_of(plan, model, selection, EVERYTHING),
        "improvements": lambda: improvements_of(plan, model, selection, EVERYTHING),
        "text": lambda: console.print(explain(plan, model, helps)),
    }
    taken = {f"{name}_cpu_ms": round(timed(work)["cpu_ms"], 2) for name, work in works.items()}
    return {"profile": profile, "images": images, "references": references, **taken}


def summary(cases: list[dict[str, object]]) -> dict[str, object]:
    worst = max(cases, key=lambda case: float(str(case["cpu_ms"])))
    times = [float(str(case["cpu_ms"])) for case in cases]
    return {
        "plans": len(cases),
        "median_cpu_ms": round(statistics.median(times), 2),
        "p95_cpu_ms": round(statistics.quantiles(times, n=20)[-1], 2),
        "worst": worst,
    }


def main() -> None:
    preferences: tuple[Preference, ...] = get_args(Preference)
    cases = [
        measure(profile, name, gib, prefer)
        for profile in list_profiles()
        for name in MODELS
        for gib in RAM_SIZES_GIB
        for prefer in preferences
    ]
    dev = [case for case in cases if case["model"] == "flux2-dev" and case["ram_gib"] == 64]
    largest = []
    for profile, gib, references, prefer in product(list_profiles(), (16, 64), (0, 10), preferences):
        with suppress(DoesNotFit):  # 10 references on the smallest cards
            largest.append(measure(profile, "flux2-dev", gib, prefer, images=4, references=references))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "goal_ms": GOAL_MS,
        "all": summary(cases),
        "dev_64_gib": summary(dev),
        "dev_4_images": summary(largest),
        "on_request": [
            on_request(profile, *counts)
            for profile in ("rtx-3060-12gb", "rtx-4090-24gb", "h100-80gb")
            for counts in ((1, 0), (4, 10))
        ],
    }
    for key in ("all", "dev_64_gib", "dev_4_images"):
        print(f"{key}: {result[key]}")
    print(json.dumps(result))
    write_atomically(RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
