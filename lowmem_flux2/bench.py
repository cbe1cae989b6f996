"""A first bench: a handful of plans, each in a process of its own, memory against latency, pixels compared.

A process each, because memory that an earlier plan left in the allocator would be counted as the next one's.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_flux2.errors import RunError
from lowmem_flux2.planning.hardware import Hardware
from lowmem_flux2.planning.job import resolve_machine
from lowmem_flux2.report import write_atomically
from lowmem_flux2.units import MIB, format_bytes, format_seconds

RUN_LIMIT_S = 3600
SEED = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One plan's run. ``step_s``: the denoise stage without loading, a step; ``failure`` is None where it finished."""

    name: str
    flags: tuple[str, ...]
    predicted_peak_bytes: int
    measured_peak_bytes: int
    predicted_s: float
    measured_s: float
    step_s: float
    pixels_sha256: str
    failure: str | None = None


def variants(hardware: Hardware) -> list[tuple[str, tuple[str, ...]]]:
    """What is compared: each compute dtype of the device, resident and streamed from where blocks can rest."""
    dtypes = [name for name in ("bf16", "fp16", "fp32") if name in hardware.matmul_flops_per_s]
    if hardware.device == "cpu":
        dtypes = [name for name in dtypes if name != "fp16"]  # emulated: an order of magnitude slower
    placements = ["resident", "pageable", "disk"] if hardware.device == "cpu" else ["resident", "pinned", "disk"]
    return [
        (f"{dtype} {placement}", ("--dtype", dtype, "--placement", placement))
        for dtype in dtypes
        for placement in placements
    ]


def run_bench(model: str, prompt: str, steps: int | None, folder: Path, console: Console) -> None:
    """Run all variants, print the table, write ``bench.json`` and ``bench.png`` into the folder."""
    hardware = resolve_machine("auto", "auto").hardware
    folder.mkdir(parents=True, exist_ok=True)
    where = "RAM" if hardware.device == "cpu" else "VRAM"
    results = []
    for name, flags in variants(hardware):
        console.print(f"running {name} ...")
        results.append(_run(model, prompt, steps, name, flags, where))
    console.print(_table(results, where))
    record = {
        "model": model,
        "prompt": prompt,
        "steps": steps,
        "seed": SEED,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": asdict(hardware),
        "memory": where,
        "results": [asdict(result) for result in results],
    }
    write_atomically(folder / "bench.json", json.dumps(record, indent=2) + "\n")
    console.print(f"wrote {folder / 'bench.json'}", soft_wrap=True)
    if all(result.failure for result in results):
        raise RunError(f"bench: every plan failed; the first said: {results[0].failure}")
    if plot(results, f"{model} on {hardware.name}", where, folder / "bench.png"):
        console.print(f"wrote {folder / 'bench.png'}", soft_wrap=True)
    else:
        console.print("no plot: matplotlib is not installed (pip install 'lowmem-flux2[bench]')")


def _run(model: str, prompt: str, steps: int | None, name: str, flags: tuple[str, ...], where: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="lowmem-flux2-bench-") as scratch:
        report, picture = Path(scratch) / "report.json", Path(scratch) / "picture.png"
        command = [sys.executable, "-m", "lowmem_flux2", "generate", "--quiet", "-m", model, "-p", prompt]
        command += ["-s", str(SEED), "-o", str(picture), "--report", str(report), "--prompt-cache", "off", *flags]
        if steps is not None:
            command += ["--steps", str(steps)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return Result(name, flags, 0, 0, 0.0, 0.0, 0.0, "", failure=f"not done after {RUN_LIMIT_S} s")
        if done.returncode != 0:
            message = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            wanted = next((line for line in message if line.startswith("error:")), message[-1])
            return Result(name, flags, 0, 0, 0.0, 0.0, 0.0, "", failure=wanted)
        raw: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return _read(raw, name, flags, where, _pixels(picture))


def _read(raw: dict[str, Any], name: str, flags: tuple[str, ...], where: str, pixels: str) -> Result:
    key = "peak_ram_bytes" if where == "RAM" else "peak_vram_bytes"
    denoise = next(stage for stage in raw["measured"]["stages"] if stage["stage"] == "denoise")
    return Result(
        name=name,
        flags=flags,
        predicted_peak_bytes=raw["plan"]["predicted"][key],
        measured_peak_bytes=raw["measured"][key],
        predicted_s=raw["plan"]["predicted"]["time_s"],
        measured_s=raw["measured"]["time_s"],
        step_s=(denoise["time_s"] - denoise["load_s"]) / raw["plan"]["workload"]["steps"],
        pixels_sha256=pixels,
    )


def _pixels(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        return hashlib.sha256(picture.tobytes()).hexdigest()


def _table(results: list[Result], where: str) -> Table:
    """Pixels get a letter: the same letter is the same picture, bit for bit."""
    letters: dict[str, str] = {}
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("plan", f"peak {where} predicted → measured", "run predicted → measured", "s/step", "pixels"):
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for result in results:
        if result.failure:
            table.add_row(result.name, result.failure, "", "", "")
            continue
        letter = letters.setdefault(result.pixels_sha256, chr(ord("A") + len(letters)))
        table.add_row(
            result.name,
            f"{format_bytes(result.predicted_peak_bytes)} → {format_bytes(result.measured_peak_bytes)}",
            f"{format_seconds(result.predicted_s)} → {format_seconds(result.measured_s)}",
            f"{result.step_s:.4f}",
            letter,
        )
    return table


def plot(results: list[Result], title: str, where: str, path: Path) -> bool:
    """Measured peak against seconds a step, one labelled point a plan; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    finished = [result for result in results if not result.failure]
    dtypes = list(dict.fromkeys(result.name.split()[0] for result in finished))
    marks = {"resident": "o", "pinned": "s", "pageable": "^", "disk": "D"}
    for result in finished:
        dtype, placement = result.name.split()
        axes.scatter(
            result.measured_peak_bytes / MIB,
            result.step_s,
            color=f"C{dtypes.index(dtype)}",
            marker=marks[placement],
            s=70,
            label=result.name,
            zorder=3,
        )
    axes.set(title=title, xlabel=f"measured peak {where} (MiB)", ylabel="seconds a denoising step")
    axes.margins(x=0.15, y=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
