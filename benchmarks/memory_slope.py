"""Is memory given back? 50 jobs, alternating between two tiny models, in one process, and the slope of what it holds.

    python benchmarks/memory_slope.py --out benchmarks/results

Writes a random dev model and a random klein model of some hundred kilobytes, then makes a picture of a new prompt with
one and the other in turn, each job in another weight format and placement than the last, with an engine of its own
that is closed again. After each job it reads the process's anonymous memory, RSS, open files and threads. The slope is
Theil and Sen's, the median of the slopes of all pairs of jobs, so that neither a pool that grows once nor a late import
counts as growth; Kendall's tau says how much of an order there is. Exits with 1 if anonymous memory grows by more than
a job may leave behind. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDE_PX, STEPS = 64, 2
KINDS = (("fp32", "resident"), ("fp32", "disk"), ("int8", "disk"), ("nf4", "pageable"), ("int4", "resident"))
"""Weight formats and placements in turn: five, so that each comes with each of the two models."""
WARM_UP = 2 * len(KINDS)
"""Jobs that do not count: each model in each kind for the first time imports, prepares and fills pools."""
GOAL_BYTES = 8 << 10
"""A job may leave this behind: less than its prompt's embeddings, the smallest tensor of a job that would matter."""


def run(models: Sequence[Path], cache: Path, jobs: int) -> list[dict[str, int]]:
    """Make the pictures in this process; what it holds after each, in bytes and counts."""
    import gc

    import torch

    from lowmem_flux2 import Engine
    from lowmem_flux2.runtime.device import host_use, release_memory

    torch.set_num_threads(1)
    held = []
    for job in range(jobs):
        weight_format, placement = KINDS[job % len(KINDS)]
        with Engine(
            str(models[job % len(models)]),
            device="cpu",
            dtype="fp32",
            weight_format=weight_format,
            text_weight_format=weight_format,
            placement=placement,
            cache_dir=cache,
        ) as engine:
            made = engine.generate(
                f"picture number {job}",
                height=SIDE_PX,
                width=SIDE_PX,
                num_inference_steps=STEPS,
                max_sequence_length=64,
                seed=job,
            )
        assert len(made.images) == 1
        del made, engine
        if job == 1:
            gc.freeze()  # what was imported stays: each collection below is quick
        gc.collect()
        release_memory(torch.device("cpu"))
        use = host_use()
        held.append(
            {
                "anonymous_bytes": use.anonymous_bytes,
                "rss_bytes": use.rss_bytes,
                "open_files": len(list(Path("/proc/self/fd").iterdir())),
                "threads": len(list(Path("/proc/self/task").iterdir())),
            }
        )
    return held


def theil_sen(values: Sequence[float]) -> float:
    """The median slope of all pairs, per step."""
    return median(
        (later - earlier) / (at - before) for (before, earlier), (at, later) in combinations(enumerate(values), 2)
    )


def kendall_tau(values: Sequence[float]) -> float:
    """Pairs that rise less those that fall, as a share of all: 1 always rises, 0 has no order."""
    signs = [(later > earlier) - (later < earlier) for earlier, later in combinations(values, 2)]
    return sum(signs) / len(signs)


def judged(held: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Slopes of what counts."""
    counted = held[WARM_UP:]
    anonymous = [each["anonymous_bytes"] for each in counted]
    slope = theil_sen(anonymous)
    return {
        "jobs": len(held),
        "warm_up_jobs": WARM_UP,
        "anonymous_bytes_per_job": slope,
        "anonymous_kendall_tau": kendall_tau(anonymous),
        "anonymous_first_and_last_bytes": [anonymous[0], anonymous[-1]],
        "rss_bytes_per_job": theil_sen([each["rss_bytes"] for each in counted]),
        "open_files": sorted({each["open_files"] for each in counted}),
        "threads": sorted({each["threads"] for each in counted}),
        "goal_bytes_per_job": GOAL_BYTES,
        "is_within_goal": slope <= GOAL_BYTES,
    }


def measure(folder: Path, models: Sequence[Path], jobs: int) -> list[dict[str, int]]:
    """``run`` in a process of its own."""
    command = [sys.executable, __file__, "--jobs", str(jobs), "--child", str(folder / "cache"), *map(str, models)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    held: list[dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", nargs="+", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        cache, *models = arguments.child
        print(json.dumps(run(models, cache, arguments.jobs)))
        return
    sys.path.append(str(ROOT / "tests"))
    import tiny

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = [tiny.write_dev(folder / "dev"), tiny.write_klein(folder / "klein")]
        held = measure(folder, models, arguments.jobs)
    figures = judged(held)
    print(
        f"{figures['jobs']} jobs: anonymous memory {figures['anonymous_bytes_per_job'] / 1024:+.2f} KiB a job "
        f"(tau {figures['anonymous_kendall_tau']:+.2f}), RSS {figures['rss_bytes_per_job'] / 1024:+.2f} KiB; "
        f"open files {figures['open_files']}, threads {figures['threads']}"
    )
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **figures, "held": held}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory-slope.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(figures))
    raise SystemExit(0 if figures["is_within_goal"] else 1)


if __name__ == "__main__":
    main()
