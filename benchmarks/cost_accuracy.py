"""Closed forms of memory against the simulator, over random cases that nothing was fitted to.

    python benchmarks/cost_accuracy.py              # prints a line a stage, writes results/cost-accuracy.json

Errors are of the device's peak, relative to the simulated one. Both count tensors alone: neither has margin or context.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

from cost_cases import compare_case, random_cases

from lowmem_flux2.report import write_atomically

RESULT = Path(__file__).parent / "results" / "cost-accuracy.json"
TOLERANCE = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    errors: dict[str, list[float]] = {}
    misses: list[str] = []
    for number, case in enumerate(random_cases(asked.count, asked.seed), start=1):
        for each in compare_case(case):
            errors.setdefault(each.stage, []).append(abs(each.device_error))
            if abs(each.device_error) > TOLERANCE:
                misses.append(f"{each.stage} {each.device_error:+.2%}: {case}")
                print(misses[-1], flush=True)
        if number % 20 == 0:
            _record(asked.out, asked.seed, number, errors, misses)
            print(f"{number} cases", flush=True)
    stages = _record(asked.out, asked.seed, asked.count, errors, misses)
    for stage, told in stages.items():
        print(f"{stage}: median {told['median']:.2%}, worst {told['worst']:.2%} of {told['cases']}")


def _record(
    out: Path, seed: int, count: int, errors: dict[str, list[float]], misses: list[str]
) -> dict[str, dict[str, float]]:
    """What is known after ``count`` cases."""
    stages = {
        stage: {"cases": len(found), "median": statistics.median(found), "worst": max(found)}
        for stage, found in errors.items()
    }
    date = datetime.now(UTC).date().isoformat()
    record = {"date": date, "seed": seed, "count": count, "stages": stages, "beyond_3_percent": misses}
    write_atomically(out, json.dumps(record, indent=2) + "\n")
    return stages


if __name__ == "__main__":
    main()
