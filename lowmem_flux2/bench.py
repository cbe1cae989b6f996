"""``lowmem-flux2 bench``: memory against latency. The same picture under falling caps on memory, in several formats.

Each run is a process of its own, because memory that an earlier one left in the allocator would be counted as the next
one's. Runs are recorded as they come, so a bench that is stopped goes on when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from lowmem_flux2.arguments import Asked
from lowmem_flux2.errors import DoesNotFit, RunError, UsageError
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.job import plan_job
from lowmem_flux2.planning.plan import Placement, Plan
from lowmem_flux2.planning.selection import Selection, compute_dtype
from lowmem_flux2.planning.support import SUPPORTED
from lowmem_flux2.planning.workload import Preference
from lowmem_flux2.report import write_atomically
from lowmem_flux2.units import GIB, format_bytes, format_seconds
from lowmem_flux2.version import __version__

RUN_LIMIT_S = 3600
QUANTIZED = ("int8", "nf4")
"""Compared by default, besides the compute dtype."""
CAPS = 4
"""A format, from the least that a plan takes to the most that one has a use for."""


@dataclass(frozen=True, slots=True)
class MemoryBench:
    """A bench, parsed.

    Args:
        words: the flags as they were typed, for the runs' own command lines; no caps, formats or seed.
        caps_bytes: of the compute device's memory; empty for ``CAPS`` of each format's own.
    """

    asked: Asked
    words: tuple[str, ...]
    seed: int
    caps_bytes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Peaks are of VRAM, or of RAM on a CPU; ``step_s``: the denoise stage without loading, a step.

    ``blocks`` are the transformer's in VRAM/pinned/pageable/disk; ``failure`` is None where the run finished, and
    nothing but the format and the cap holds where it did not.
    """

    weight_format: str
    cap_bytes: int
    blocks: str = ""
    tile_px: int = 0
    predicted_peak_bytes: int = 0
    measured_peak_bytes: int = 0
    predicted_step_s: float = 0.0
    step_s: float = 0.0
    predicted_s: float = 0.0
    measured_s: float = 0.0
    pixels_sha256: str = ""
    failure: str | None = None


def run_bench(wanted: MemoryBench, folder: Path, console: Console) -> list[Result]:
    """Run all, print the table, write ``bench.json`` and ``bench.png`` into the folder.

    Raises:
        RunError: every run failed.
    """
    asked = wanted.asked
    memory = "RAM" if asked.machine.hardware.device == "cpu" else "VRAM"
    folder.mkdir(parents=True, exist_ok=True)
    setting = {
        "model": asked.model,
        "flags": list(wanted.words),
        "seed": wanted.seed,
        "memory": memory,
        "hardware": asked.machine.hardware.name,
        "version": __version__,
    }
    known = _known(folder / "bench.json", setting)
    results: list[Result] = []
    for weight_format in formats_of(asked):
        try:
            caps = wanted.caps_bytes or caps_of(asked, weight_format)
        except DoesNotFit as error:
            results.append(Result(weight_format, 0, failure=str(error).splitlines()[0]))
            continue
        for cap in caps:
            found = known.get((weight_format, cap))
            if found is None:
                console.print(f"{weight_format} in {format_bytes(cap)} of {memory} ...")
                found = _run(wanted, weight_format, cap, memory)
            results.append(found)
            record = setting | {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "results": [asdict(result) for result in results],
            }
            write_atomically(folder / "bench.json", json.dumps(record, indent=2) + "\n")
    console.print(_table(results, memory))
    console.print(f"wrote {folder / 'bench.json'}", soft_wrap=True)
    if all(result.failure for result in results):
        raise RunError(f"bench: no run finished; the first said: {results[0].failure}")
    if plot(results, f"{asked.model} on {asked.machine.hardware.name}", memory, folder / "bench.png"):
        console.print(f"wrote {folder / 'bench.png'}", soft_wrap=True)
    else:
        console.print("no plot: matplotlib is not installed (pip install 'lowmem-flux2[bench]')")
    return results


def formats_of(asked: Asked) -> tuple[str, ...]:
    """The format that was asked for; else the compute dtype and two quantized ones, where they run."""
    if asked.selection.weight_format != "auto":
        return (asked.selection.weight_format,)
    plain = compute_dtype(asked.selection, asked.machine.hardware)
    return plain, *(name for name in QUANTIZED if name in SUPPORTED.weight_formats)


def caps_of(asked: Asked, weight_format: str, count: int = CAPS) -> tuple[int, ...]:
    """Caps from the peak of the leanest plan to that of the fastest, or of the one with all blocks resident where that
    fits; equal factors apart, each rounded up to 1 MiB.

    Raises:
        DoesNotFit: there is no plan.
    """
    least, most = (_peak(_plan(asked, weight_format, None, prefer)) for prefer in ("memory", "speed"))
    if asked.selection.placement == "auto":
        with suppress(DoesNotFit):
            resident = replace(asked, selection=replace(asked.selection, placement="resident"))
            most = max(most, _peak(_plan(resident, weight_format, None)))
    factor = max(most / least, 1.0) ** (1 / (count - 1))
    caps = [-(-int(least * factor**number) // (1 << 20)) << 20 for number in range(count)]
    return tuple(dict.fromkeys(caps))


def _plan(asked: Asked, weight_format: str, cap_bytes: int | None, prefer: str = "") -> Plan:
    selection = replace(
        _of_format(asked.selection, weight_format), prefer=cast(Preference, prefer or asked.selection.prefer)
    )
    if cap_bytes is not None:
        cap = "max_ram_bytes" if asked.machine.hardware.device == "cpu" else "max_vram_bytes"
        selection = replace(selection, **{cap: cap_bytes})  # type: ignore[arg-type]
    return plan_job(asked.source, asked.machine, asked.request, selection, running=True)


def _of_format(selection: Selection, weight_format: str) -> Selection:
    text = selection.text_weight_format
    return replace(selection, weight_format=weight_format, text_weight_format=weight_format if text == "auto" else text)


def _peak(plan: Plan) -> int:
    return plan.peak_ram_bytes if plan.hardware.device == "cpu" else plan.peak_vram_bytes


def _run(wanted: MemoryBench, weight_format: str, cap_bytes: int, memory: str) -> Result:
    result = Result(weight_format, cap_bytes)
    try:
        _plan(wanted.asked, weight_format, cap_bytes)
    except DoesNotFit as error:
        return replace(result, failure=str(error).splitlines()[0])
    text = _of_format(wanted.asked.selection, weight_format).text_weight_format
    with tempfile.TemporaryDirectory(prefix="lowmem-flux2-bench-") as scratch:
        report, picture = Path(scratch) / "report.json", Path(scratch) / "picture.png"
        command = [sys.executable, "-m", "lowmem_flux2", "generate", "--quiet", *wanted.words]
        command += ["--weight-format", weight_format, "--text-weight-format", text, "--prompt-cache", "off"]
        command += ["--max-ram" if memory == "RAM" else "--max-vram", str(cap_bytes)]
        command += ["-s", str(wanted.seed), "-o", str(picture), "--report", str(report)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return replace(result, failure=f"not done after {RUN_LIMIT_S} s")
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return replace(result, failure=next((line for line in lines if line.startswith("error:")), lines[-1]))
        return _read(json.loads(report.read_text(encoding="utf-8")), result, memory, _pixels(picture))


def _read(raw: dict[str, Any], result: Result, memory: str, pixels: str) -> Result:
    key = f"peak_{memory.lower()}_bytes"
    planned = next(stage for stage in raw["plan"]["stages"] if stage["stage"] == "denoise")
    measured = next(stage for stage in raw["measured"]["stages"] if stage["stage"] == "denoise")
    decoded = next(stage for stage in raw["plan"]["stages"] if stage["stage"] == "decode")
    steps = raw["plan"]["workload"]["steps"]
    return replace(
        result,
        blocks="/".join(str(planned["placements"][placement.value]) for placement in Placement),
        tile_px=decoded["tile_px"],
        predicted_peak_bytes=raw["plan"]["predicted"][key],
        measured_peak_bytes=raw["measured"][key],
        predicted_step_s=planned["cost"]["run_s"] / steps,
        step_s=(measured["time_s"] - measured["load_s"]) / steps,
        predicted_s=raw["plan"]["predicted"]["time_s"],
        measured_s=raw["measured"]["time_s"],
        pixels_sha256=pixels,
    )


def _pixels(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        return hashlib.sha256(picture.tobytes()).hexdigest()


def _known(path: Path, setting: dict[str, Any]) -> dict[tuple[str, int], Result]:
    """What an earlier bench of the same setting finished.

    Raises:
        UsageError: the file is of another bench, and must not be overwritten.
    """
    if not path.exists():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = [Result(**one) for one in raw["results"]]
        is_same = all(raw[name] == value for name, value in setting.items())
    except (OSError, ValueError, KeyError, TypeError):
        is_same, found = False, []
    if not is_same:
        raise UsageError(f"{path} is of another bench: give another folder with -o, or remove it")
    return {(one.weight_format, one.cap_bytes): one for one in found if one.failure is None}


def _table(results: Sequence[Result], memory: str) -> Table:
    letters: dict[str, str] = {}
    table = Table(show_edge=False, pad_edge=False, caption_justify="left")
    table.caption = (
        f"predicted → measured; cap and peak: of {memory}; blocks: in VRAM/pinned/pageable/disk; "
        "pixels: the same letter is the same picture, bit for bit"
    )
    for heading in ("weights", "cap", "blocks", "tile", "peak", "s/step", "run", "pixels"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for one in results:
        cap = format_bytes(one.cap_bytes) if one.cap_bytes else ""
        if one.failure:
            table.add_row(one.weight_format, cap, one.failure)
            continue
        table.add_row(
            one.weight_format,
            cap,
            one.blocks,
            f"{one.tile_px} px" if one.tile_px else "off",
            f"{format_bytes(one.predicted_peak_bytes)} → {format_bytes(one.measured_peak_bytes)}",
            f"{one.predicted_step_s:.3g} → {one.step_s:.3g}",
            f"{format_seconds(one.predicted_s)} → {format_seconds(one.measured_s)}",
            letters.setdefault(one.pixels_sha256, chr(ord("A") + len(letters))),
        )
    return table


def plot(results: Sequence[Result], title: str, memory: str, path: Path) -> bool:
    """Peak against seconds a step, a line a format: measured, and predicted dashed; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    finished = [one for one in results if not one.failure]
    for number, name in enumerate(dict.fromkeys(one.weight_format for one in finished)):
        own = [one for one in finished if one.weight_format == name]
        color = f"C{number}"
        axes.plot([one.measured_peak_bytes / GIB for one in own], [one.step_s for one in own], "o-", color=color)
        predicted = [one.predicted_peak_bytes / GIB for one in own], [one.predicted_step_s for one in own]
        axes.plot(*predicted, "o--", color=color, mfc="white", alpha=0.6)
        axes.plot([], [], "o-", color=color, label=f"{name}, error {FORMATS[name].weight_error:.2g}")
    axes.plot([], [], "o--", color="grey", mfc="white", label="predicted")
    axes.set(title=title, xlabel=f"peak {memory}, GiB", ylabel="seconds a denoising step")
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
