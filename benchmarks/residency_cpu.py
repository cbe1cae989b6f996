"""Run a model many times larger than the memory it is given: full-size klein-4b shapes, 3 GiB, from disk, on a CPU.

    python benchmarks/residency_cpu.py --folder /var/tmp/residency --out benchmarks/results

Writes a klein-4b-shaped checkpoint with seeded random bf16 weights (transformer 7.75 GB, Qwen3-4B-shaped encoder 8
GB), then makes the same 256x256 picture in 2 steps twice: inside a memory cgroup of 3 GiB, page cache included, and
fully resident without a limit, ``--runs`` times in turn. Prints and records peak memory, bytes that the block device
read (it must have read what was streamed), seconds a step, the ratio of the two, and whether the latents are bit-
equal. Needs Linux with the v1 memory controller, root, 17 GB of disk, and about 10 GB of RAM for the resident run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klein_checkpoint import ensure_checkpoint

SIDE_PX, STEPS = 256, 2
CGROUP = Path("/sys/fs/cgroup/memory/lowmem-flux2-residency")
ROOT = Path(__file__).resolve().parents[1]


def child(folder: Path, result: Path, placement: str, dtype: str) -> None:
    """Make the picture in this process; write latents and figures."""
    import time

    import torch

    from lowmem_flux2 import Engine

    moments = []

    def note(_: object, __: int, ___: torch.Tensor, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moments.append(time.perf_counter())
        return kept

    engine = Engine(str(folder), dtype=dtype, placement=placement, prompt_cache="off")
    made = engine.generate(
        "a lighthouse at dusk",
        height=SIDE_PX,
        width=SIDE_PX,
        num_inference_steps=STEPS,
        seed=0,
        output_type="latent",
        callback_on_step_end=note,
    )
    torch.save(made.images, result.with_suffix(".pt"))
    report = made.report.to_json()
    denoise = next(stage for stage in report["measured"]["stages"] if stage["stage"] == "denoise")
    # The first step follows loading; both together are the stage, so its first step is what loading leaves of the rest.
    steps = [denoise["time_s"] - denoise["load_s"] - (moments[-1] - moments[0]), moments[-1] - moments[0]]
    result.write_text(
        json.dumps(
            {
                "step_s": steps,
                "measured": report["measured"],
                "predicted": report["plan"]["predicted"],
                "denoise_placements": next(s for s in report["plan"]["stages"] if s["stage"] == "denoise")[
                    "placements"
                ],
            }
        )
    )


def _sectors_read() -> int:
    """512-byte sectors that all block devices (partitions apart) have read since boot."""
    lines = [line.split() for line in Path("/proc/diskstats").read_text().splitlines()]
    return sum(int(fields[5]) for fields in lines if (Path("/sys/block") / fields[2]).exists())


def run(folder: Path, scratch: Path, name: str, placement: str, dtype: str, limit_bytes: int | None) -> dict[str, Any]:
    """One child run, from cold caches; inside the cgroup where a limit is given."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    result = scratch / f"{name}.json"
    command = [sys.executable, __file__, "--folder", str(folder), "--child", str(result), "--placement", placement]
    command += ["--dtype", dtype]
    if limit_bytes is not None:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(limit_bytes))
        (CGROUP / "memory.max_usage_in_bytes").write_text("0")
        # The child enters the cgroup before Python starts: pages touched outside are charged outside.
        command = ["sh", "-c", f'echo $$ > {CGROUP}/cgroup.procs && exec "$@"', "sh", *command]
    before = _sectors_read()
    done = subprocess.run(command, check=False)
    figures: dict[str, Any] = {"name": name, "rc": done.returncode, "read_bytes": 512 * (_sectors_read() - before)}
    if limit_bytes is not None:
        figures["cgroup_limit_bytes"] = limit_bytes
        figures["cgroup_peak_bytes"] = int((CGROUP / "memory.max_usage_in_bytes").read_text())
        CGROUP.rmdir()
    if done.returncode == 0:
        figures |= json.loads(result.read_text())
    return figures


def _pair(folder: Path, scratch: Path, dtype: str, limit_bytes: int) -> dict[str, Any]:
    """The limited and the resident run, compared."""
    import torch

    limited = run(folder, scratch, "limited", "auto", dtype, limit_bytes)
    resident = run(folder, scratch, "resident", "resident", dtype, None)
    compared: dict[str, Any] = {"limited": limited, "resident": resident}
    if limited["rc"] == resident["rc"] == 0:
        streamed_bytes = sum(stage["disk_read_bytes"] for stage in limited["measured"]["stages"])
        assert limited["read_bytes"] >= streamed_bytes, (
            "the block device read less than was streamed: pages were cached"
        )
        latents = [torch.load(scratch / f"{name}.pt", weights_only=True) for name in ("limited", "resident")]
        compared["streamed_bytes"] = streamed_bytes
        compared["bit_equal"] = bool(torch.equal(*latents))
        compared["finite"] = bool(torch.isfinite(latents[0]).all())
        compared["step_ratio"] = limited["step_s"][1] / resident["step_s"][1]
    return compared


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in found["flags"].split()]
    return f"{found['model name']}, {os.cpu_count()} cores, {' '.join(fast)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="the checkpoint; written there if missing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--limit-gib", type=float, default=3.0)
    parser.add_argument("--runs", type=int, default=1, help="pairs of a limited and a resident run")
    parser.add_argument("--dtype", default="bf16", help="of compute: a CPU without bf16 units is quicker in fp32")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--placement", default="auto", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.folder, arguments.child, arguments.placement, arguments.dtype)
        return
    ensure_checkpoint(arguments.folder)
    scratch = arguments.folder.parent
    limit = int(arguments.limit_gib * (1 << 30))
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "dtype": arguments.dtype,
        "side_px": SIDE_PX,
        "steps": STEPS,
        "runs": [_pair(arguments.folder, scratch, arguments.dtype, limit) for _ in range(arguments.runs)],
    }
    ratios = [pair["step_ratio"] for pair in record["runs"] if "step_ratio" in pair]
    if ratios:
        record |= {"step_ratios": ratios, "median_step_ratio": statistics.median(ratios)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "residency-cpu" if arguments.dtype == "bf16" else f"residency-cpu-{arguments.dtype}"
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
