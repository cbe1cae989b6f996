"""Predicted beside measured RAM and seconds of whole runs on this CPU: full-size klein-4b shapes, at several sizes.

    python benchmarks/predicted_cpu.py --folder /var/tmp/klein-4b     # 17 GB of disk; about 8 minutes on two cores

Calibrates first, so that times are those of a calibrated machine; then one process a case, two steps each, nothing in
the prompt cache. Weights are seeded random ones. Writes results/predicted-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from klein_checkpoint import ensure_checkpoint

from lowmem_flux2.planning.identity import cpu_model
from lowmem_flux2.report import write_atomically
from lowmem_flux2.units import GIB

RESULT = Path(__file__).parent / "results" / "predicted-cpu.json"
STEPS = 2
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (256, ()),
    (512, ()),
    (512, ("--dtype", "fp32")),
    (768, ()),
    (1024, ()),
    (1024, ("--vae-tile", "512")),
)
"""Sides in pixels, and what else is asked for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    ensure_checkpoint(asked.folder)
    found: list[dict[str, Any]] = []
    with TemporaryDirectory() as made:
        profile = Path(made) / "calibrated.toml"
        _lowmem_flux2("calibrate", "--device", "cpu", "-o", str(profile))
        for number, (side, more) in enumerate(CASES):
            report = Path(made) / f"{number}.json"
            run = ("generate", "-m", str(asked.folder), "-p", "a lighthouse at dusk", "--seed", "0", "--quiet")
            size = ("--width", str(side), "--height", str(side), "--steps", str(STEPS))
            kept = ("--prompt-cache", "off", "--report", str(report), "-o", str(Path(made) / f"{number}.png"))
            _lowmem_flux2(*run, *size, *kept, "--profile", str(profile), "--device", "cpu", *more)
            found += [
                {"side_px": side, "asked": " ".join(more), **row} for row in _rows(json.loads(report.read_text()))
            ]
            _record(asked.out, found)
    _record(asked.out, found)


def _lowmem_flux2(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "lowmem_flux2", *arguments], check=True, stdout=subprocess.DEVNULL)


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a stage."""
    costs = {stage["stage"]: stage["cost"] for stage in report["plan"]["stages"]}
    rows = []
    for measured in report["measured"]["stages"]:
        cost = costs[measured["stage"]]
        rows.append(
            {
                "stage": measured["stage"],
                "ram_bytes": {"predicted": cost["peak_ram_bytes"], "measured": measured["peak_ram_bytes"]},
                "time_s": {"predicted": round(cost["time_s"], 2), "measured": round(measured["time_s"], 2)},
            }
        )
        ram, time = rows[-1]["ram_bytes"], rows[-1]["time_s"]
        print(
            f"{measured['stage']:8} {ram['predicted'] / GIB:.2f} -> {ram['measured'] / GIB:.2f} GiB, "
            f"{time['predicted']:.1f} -> {time['measured']:.1f} s",
            flush=True,
        )
    return rows


def _record(out: Path, rows: list[dict[str, Any]]) -> None:
    record = {"date": datetime.now(UTC).date().isoformat(), "cpu": cpu_model(), "steps": STEPS, "rows": rows}
    write_atomically(out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
