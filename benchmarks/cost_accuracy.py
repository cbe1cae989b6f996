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
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    errors: dict[str, list[float]] = {}
    for case in random_cases(asked.count, asked.seed):
        for each in compare_case(case):
            errors.setdefault(each.stage, []).append(abs(each.device_error))
            if abs(each.device_error) > TOLERANCE:
                print(f"{each.stage} {each.device_error:+.2%}: {case}")
    stages = {
        stage: {"cases": len(found), "median": statistics.median(found), "worst": max(found)}
        for stage, found in errors.items()
    }
    for stage, told in stages.items():
        print(f"{stage}: median {told['median']:.2%}, worst {told['worst']:.2%} of {told['cases']}")
    record = {"date": datetime.now(UTC).date().isoformat(), "seed": asked.seed, "count": asked.count, "stages": stages}
    write_atomically(asked.out, json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
