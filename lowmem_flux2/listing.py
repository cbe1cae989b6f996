"""``lowmem-flux2 profiles``: the shipped hardware profiles, and the check of one's own.

Profiles' reader is imported when a command is called: ``--help`` needs none of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowmem_flux2.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="Hardware profiles: list, show NAME, check FILE.")
out = Console(highlight=False)


@app.command("list")
def list_all() -> None:
    """All shipped profiles."""
    from lowmem_flux2.planning.hardware import list_profiles, read_profile

    table = Table(show_edge=False, pad_edge=False)
    for heading in ("name", "VRAM", "bf16/fp16 TFLOP/s", "h2d GB/s", "card"):
        table.add_column(heading, justify="left" if heading in ("name", "card") else "right")
    for name in list_profiles():
        profile = read_profile(name)
        hardware = profile.hardware
        rates = hardware.matmul_flops_per_s
        rate = rates.get("bf16", rates.get("fp16", rates["fp32"]))
        table.add_row(
            name,
            format_bytes(hardware.vram_bytes) if hardware.vram_bytes else "-",
            f"{rate / 1e12:.1f}",
            f"{hardware.h2d_pinned_bytes_per_s / 1e9:.1f}",
            profile.title,
        )
    out.print(table)
    out.print("Rates are what planning counts on: peak times an achieved fraction. 'profiles show NAME' gives sources.")


@app.command("show")
def show(name: Annotated[str, typer.Argument(help="A name of 'profiles list', or a TOML file.")]) -> None:
    """One profile, with the source of every number."""
    from lowmem_flux2.planning.hardware import read_profile

    profile = read_profile(name)
    out.print(f"# {profile.title}: {profile.path}", soft_wrap=True)
    out.print(profile.path.read_text(encoding="utf-8"), end="", markup=False, soft_wrap=True)


@app.command("check")
def check(file: Annotated[Path, typer.Argument(help="A profile TOML.")]) -> None:
    """Check a profile file; names file, line and key of each fault."""
    from lowmem_flux2.planning.hardware import check_profile

    hardware = check_profile(file)
    out.print(f"{file}: {hardware.name} is a valid {hardware.device} profile", soft_wrap=True)
