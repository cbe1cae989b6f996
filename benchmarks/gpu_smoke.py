"""The suite for CUDA cards in a short session: what says most first, within one span of time that it keeps by itself.

    python benchmarks/gpu_smoke.py --out results                       # at most 540 s
    python benchmarks/gpu_smoke.py --out results --budget 240          # again, for what found no time
    python benchmarks/gpu_smoke.py --out /tmp/x --device cpu --tiny    # does it work? toys, on a CPU

In 900 s of a card, the start of its machine and copying included: the first command as one call, its records fetched
as soon as it ends, and then the second with the seconds that are left, less 30 for fetching, its records put back into
``--out`` before if the machine does not keep them: cases on record are not run again. ``benchmarks/gpu_smoke.sh`` does
the same where wheels must be brought along.

In order, each with its share of the time, and with what those before it left over:

    parity     streamed equals resident, bit for bit: dev's blocks in each format, klein-4b with its encoder
    caps       a hard cap that holds, predicted beside measured peak and step
    recovery   a real out of memory in each stage, gone on from
    ratio      step time streamed over resident; w8a8's beside bf16's
    peers      diffusers' group offload, and the engine under its peak
    tests      tests/gpu
    compiled   blocks compiled one by one
    disktier   weights on disk

A part that ends early leaves its time to those behind it; what is left at the end goes once more to those that were cut
short, in the same order. Records are those of ``gpu_suite.py``, whole after every case, and ``smoke.json`` beside them,
whole after every part: a run that is cut off has written what it knows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import gpu_suite  # noqa: E402

from lowmem_flux2.errors import LowMemFlux2Error  # noqa: E402
from lowmem_flux2.planning.job import resolve_machine  # noqa: E402
from lowmem_flux2.report import write_atomically  # noqa: E402

BUDGET_S = 540.0
ENDS_S = 15.0
"""Of the budget, for imports before and for ending what runs after."""
SHARES = {"parity": 135, "caps": 120, "recovery": 75, "ratio": 95, "peers": 100}
"""Seconds of a whole run; parts beyond these have what is left."""
BEYOND = ("tests", "compiled", "disktier")
LEAST_S = 20.0
"""With less left no part is begun: a worker's imports and CUDA context take some ten seconds."""


def main() -> int:
    arguments = _parser().parse_args()
    start = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    suite = gpu_suite.parse(
        ["--part", "all", "--out", str(arguments.out), "--device", arguments.device, "--profile", arguments.profile]
        + (["--tiny"] if arguments.tiny else [])
    )
    try:
        machine = resolve_machine(arguments.profile, arguments.device)
    except LowMemFlux2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code

    def run(part: str, seconds: float) -> dict[str, Any]:
        if part == "tests":
            return tests(arguments.out, seconds)
        suite.budget = seconds
        try:
            return gpu_suite.run_part(part, suite, machine)
        except (RuntimeError, LowMemFlux2Error) as error:  # its worker did not start, or its record is none
            print(f"{part}: {error}", file=sys.stderr)
            return {"part": part, "cut_short": False, "passed": False, "error": str(error)}

    done = in_order(run, start, arguments.budget, arguments.out, arguments.only)
    return 0 if done and all(part["passed"] for part in done) else 1


def in_order(
    run: Callable[[str, float], dict[str, Any]], start: float, budget_s: float, out: Path, only: list[str]
) -> list[dict[str, Any]]:
    """Run the parts, and those that were cut short once more; what each came to, in ``smoke.json`` too.

    Args:
        run: given a part and its seconds.
        start: by ``time.monotonic``.
        budget_s: from then on.
        only: parts; none for all.
    """
    deadline, ends = start + budget_s - ENDS_S, {}
    for part, spent in zip(SHARES, accumulate(SHARES.values()), strict=True):
        ends[part] = start + spent * (budget_s - ENDS_S) / (BUDGET_S - ENDS_S)
    parts = [part for part in (*SHARES, *BEYOND) if not only or part in only]
    done: list[dict[str, Any]] = []

    def take(part: str, end: float) -> None:
        left = end - time.monotonic()
        if left < LEAST_S:
            return
        done.append(run(part, left))
        write_atomically(out / "smoke.json", json.dumps({"budget_s": budget_s, "parts": done}, indent=1) + "\n")

    for part in parts:
        take(part, deadline if only else ends.get(part, deadline))
    for part in [each["part"] for each in done if each["cut_short"]]:
        take(part, deadline)
    return done


def tests(out: Path, seconds: float) -> dict[str, Any]:
    """``tests/gpu`` but for its recovery, which the part of that name does at full size; output in ``tests.log``."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", "tests/gpu"]
    with (out / "tests.log").open("ab") as log:
        try:
            ignored = ["--ignore", "tests/gpu/test_recovery.py"]
            code = subprocess.run([*command, *ignored], cwd=ROOT, stdout=log, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    found = {"part": "tests", "seconds": time.monotonic() - start, "cut_short": code is None, "passed": code == 0}
    print(json.dumps(found), flush=True)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the records are")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--only", nargs="+", default=[], choices=(*SHARES, *BEYOND), help="only these parts")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--profile", default=gpu_suite.AUTO, help="auto, a profile's name or a TOML file")
    parser.add_argument("--tiny", action="store_true", help="toy widths: does it work?")
    return parser


if __name__ == "__main__":
    sys.exit(main())
