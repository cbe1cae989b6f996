"""What preparing a full-size model takes: memory, and speed beside a plain copy of the same bytes.

    python benchmarks/prepare_rss.py --folder /var/tmp/klein-4b --out benchmarks/results

Prepares transformer and text encoder of a klein-4b-shaped checkpoint (written there if missing, 15.7 GB) to int8 and
nf4, each from cold caches in a process of its own, after a copy of the component's files through the page cache with a
sync at its end. Rates are of source bytes: those of the blocks prepared, those of the files copied. Needs Linux, root
(to drop caches), and 24 GB of disk, which it gives back but for the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klein_checkpoint import ROOT, ensure_checkpoint

FORMATS = ("int8", "nf4")
COMPONENTS = ("transformer", "text_encoder")
ALLOWED_BYTES = 3 << 29
"""Goal: peak RSS of at most 1.5 GiB and twice the largest block as it is stored."""


def child(folder: Path, cache: Path, component: str, weight_format: str) -> dict[str, Any]:
    """Prepare in this process."""
    import torch

    from lowmem_flux2.planning.sources import resolve_model
    from lowmem_flux2.runtime.device import host_use, measure
    from lowmem_flux2.runtime.prepare import prepare

    spec = resolve_model(str(folder), offline=True).spec
    before = host_use()
    with measure(torch.device("cpu"), 0) as taken:
        store = prepare(folder, spec, component, weight_format, "bf16", cache)
    blocks = spec.transformer.blocks if component == "transformer" else spec.text_encoder.blocks
    high_water = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {
        "component": component,
        "weight_format": weight_format,
        "time_s": taken.time_s,
        "source_bytes": 2 * sum(block.total_weights for block in blocks),
        "stored_bytes": store.total_bytes,
        "largest_block_bytes": max(store.manifest.block_bytes),
        "libraries_rss_bytes": before.rss_bytes,
        "peak_rss_bytes": int(high_water) << 10,
        "peak_anonymous_bytes": taken.peak_ram_bytes,
    }


def cold() -> None:
    """Write everything out and forget every cached page."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def copy(folder: Path, target: Path) -> dict[str, float]:
    """Copy a component's files as ``cp`` does, sync, remove the copy."""
    cold()
    files = sorted(folder.glob("*.safetensors"))
    start = time.perf_counter()
    with target.open("wb") as file:
        for path in files:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    taken = time.perf_counter() - start
    target.unlink()
    return {"time_s": taken, "bytes": float(sum(path.stat().st_size for path in files))}


def run(folder: Path, scratch: Path) -> list[dict[str, Any]]:
    made = []
    for component in COMPONENTS:
        plain = copy(folder / component, scratch / "copy.tmp")
        copy_rate = plain["bytes"] / plain["time_s"]
        for name in FORMATS:
            cold()
            cache = scratch / "cache"
            load = os.getloadavg()[0]
            command = [sys.executable, __file__, "--folder", str(folder), "--child", component, name, str(cache)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            shutil.rmtree(cache)
            figures = json.loads(done.stdout.splitlines()[-1])
            goal = ALLOWED_BYTES + 2 * figures["largest_block_bytes"]
            rate = figures["source_bytes"] / figures["time_s"]
            figures |= {
                "source_bytes_per_s": rate,
                "copy_bytes_per_s": copy_rate,
                "ratio_to_copy": rate / copy_rate,
                "goal_rss_bytes": goal,
                "is_within_goal": figures["peak_rss_bytes"] <= goal,
                "load_average_before": load,
            }
            print(
                f"{component} to {name}: {figures['time_s']:.1f} s, {rate / 1e6:.0f} MB/s of source, "
                f"{rate / copy_rate:.2f} times a copy's {copy_rate / 1e6:.0f} MB/s; peak RSS "
                f"{figures['peak_rss_bytes'] / 2**30:.2f} GiB of {goal / 2**30:.2f} allowed",
                flush=True,
            )
            made.append(figures)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint; written there if missing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        component, weight_format, cache = arguments.child
        print(json.dumps(child(arguments.folder, Path(cache), component, weight_format)))
        return
    ensure_checkpoint(arguments.folder)
    scratch = arguments.folder.parent / "prepare-rss.tmp"
    scratch.mkdir()
    try:
        made = run(arguments.folder, scratch)
    finally:
        shutil.rmtree(scratch)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"virtual machine, {os.cpu_count()} cores",
        "prepared": made,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prepare-rss.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
