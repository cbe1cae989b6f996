"""Write what the README shows of plans, as planned now: python tools/plans.py"""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

from rich.console import Console

from lowmem_flux2.planning.explain import explain
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.hardware import list_profiles
from lowmem_flux2.planning.improvements import improvements_of
from lowmem_flux2.planning.job import plan_job, resolve_machine
from lowmem_flux2.planning.selection import Selection
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.planning.support import SUPPORTED
from lowmem_flux2.planning.workload import make_request
from lowmem_flux2.tables import COMMON, markdown, rows
from lowmem_flux2.units import GIB

EXAMPLE = ("<!-- example: written by tools/plans.py -->", "<!-- end of example -->")
PLANS = ("<!-- plans: written by tools/plans.py -->", "<!-- end of plans -->")
OTHERS = ("<!-- other plans: written by tools/plans.py -->", "<!-- end of other plans -->")
MODEL, PROFILE, RAM_GIB = "flux2-dev", "rtx-4070-12gb", 24


def example() -> str:
    """What one ``plan`` command prints, with every library installed, in a block of code."""
    support = replace(SUPPORTED, weight_formats=frozenset(FORMATS))
    source, selection = resolve_model(MODEL, offline=True), Selection(max_ram_bytes=RAM_GIB * GIB)
    machine = resolve_machine(PROFILE, "auto", RAM_GIB * GIB)
    plan = plan_job(source, machine, make_request(source.spec, ("x",)), selection, support=support)
    console = Console(width=100, record=True, file=StringIO())
    console.print(explain(plan, source.spec, improvements_of(plan, source.spec, selection, support)))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    command = f"$ lowmem-flux2 plan -m {MODEL} --profile {PROFILE} --max-ram {RAM_GIB}GiB"
    return "\n".join(["```", command, *lines, "```"])


def rewritten(readme: str) -> str:
    """The README with what lies between the marks written anew."""
    others = markdown(rows(name for name in list_profiles() if name not in COMMON))
    for (begin, end), text in ((EXAMPLE, example()), (PLANS, markdown(rows(COMMON))), (OTHERS, others)):
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return readme


if __name__ == "__main__":
    readme = Path(__file__).resolve().parents[1] / "README.md"
    readme.write_text(rewritten(readme.read_text(encoding="utf-8")), encoding="utf-8")
