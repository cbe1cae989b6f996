"""Relative error of each weight format on random weights at FLUX.2's widths.

    python benchmarks/weight_errors.py --out benchmarks/results

Gaussian weights, and heavy-tailed ones (Student's t with 5 degrees of freedom: outliers as trained layers have them),
both scaled to a standard deviation as given, for rows as long as the Linears of dev (6144, 18432) and klein (3072,
4096, 9216). Error: norm of the difference over the norm of the weight, in float32, weights in bf16. For w8a8, which
rounds inputs too, also that of a Linear's result for heavy-tailed inputs; for nf4-mixed the root mean square over dev's
Linears, each in its bits. Writes weight-errors.json; tools/figures.py
takes the planner's figures from it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import torch
from torch import nn

from lowmem_flux2.planning.formats import FORMATS, MIXED
from lowmem_flux2.planning.mixed import mixed_blocks
from lowmem_flux2.planning.sources import resolve_model
from lowmem_flux2.report import write_atomically
from lowmem_flux2.runtime.quantize import MIXED_LINEARS, STORED
from lowmem_flux2.runtime.stored_linear import StoredLinear
from lowmem_flux2.runtime.versions import versions

ROOT = Path(__file__).resolve().parents[1]
ROWS = 128
TOKENS = 64
COLUMNS = (3072, 4096, 6144, 9216, 18432)
DEVIATIONS = (0.005, 0.02, 0.05)
DEGREES = 5


def weights(kind: str, columns: int, deviation: float, seed: int = 0) -> torch.Tensor:
    """(ROWS, columns) bf16."""
    generator = torch.Generator().manual_seed(columns + seed)
    values = torch.randn(ROWS, columns, generator=generator)
    if kind == "heavy-tailed":
        chi = torch.randn(DEGREES, ROWS, columns, generator=generator).square().sum(dim=0)
        values = values / (chi / DEGREES).sqrt() * ((DEGREES - 2) / DEGREES) ** 0.5
    return (values * deviation).to(torch.bfloat16)


def error_and_bytes(name: str, weight: torch.Tensor) -> tuple[float, float, float]:
    """Relative error of the weight and of a result, and stored bytes a weight with scales."""
    if name == MIXED:
        found = [(share, error_and_bytes_of(MIXED_LINEARS[bits], weight)) for bits, share in shares_of_bits().items()]
        error = sum(share * each**2 for share, (each, _, _) in found) ** 0.5
        return error, error, sum(share * size for share, (_, _, size) in found)
    return error_and_bytes_of(STORED[name], weight)


def shares_of_bits() -> dict[int, float]:
    """Of dev's weights in ``MIXED``: its error is the root of the mean square over all of them."""
    weights: Counter[int] = Counter()
    for block in mixed_blocks(resolve_model("flux2-dev", offline=True).spec.transformer):
        for (rows, columns), bits in zip(block.linears, block.bits, strict=True):
            weights[bits] += rows * columns
    return {bits: count / weights.total() for bits, count in weights.items()}


def error_and_bytes_of(kind: type[StoredLinear], weight: torch.Tensor) -> tuple[float, float, float]:
    """The same of one kind of Linear."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    stored = kind(linear, torch.bfloat16)
    tensors = kind.quantize(weight, torch.bfloat16)
    stored._buffers.update(tensors)
    difference = stored.dequantize().float() - weight.float()
    error = result = float(difference.norm() / weight.float().norm())
    if FORMATS[kind.format_name].compute_class:
        inputs = weights("heavy-tailed", weight.shape[1], 1.0, seed=1)[:TOKENS]
        wanted = inputs.float() @ weight.float().t()
        result = float((stored(inputs).float() - wanted).norm() / wanted.norm())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return error, result, size / weight.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    results = []
    for kind, columns, deviation in product(("gaussian", "heavy-tailed"), COLUMNS, DEVIATIONS):
        weight = weights(kind, columns, deviation)
        for name in STORED:
            error, result, size = error_and_bytes(name, weight)
            results.append(
                {
                    "weight_format": name,
                    "weights": kind,
                    "columns": columns,
                    "deviation": deviation,
                    "relative_error": error,
                    "result_error": result,
                    "bytes_per_weight": size,
                }
            )
    record = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "rows": ROWS, "versions": versions()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "weight-errors.json", json.dumps(record | {"results": results}, indent=2) + "\n")
    print(f"{'format':9} {'weights':13} {'bytes/weight':>12} {'least':>7} {'median':>7} {'most':>7}")
    for name in STORED:
        for kind in ("gaussian", "heavy-tailed"):
            rows = [row for row in results if (row["weight_format"], row["weights"]) == (name, kind)]
            errors = sorted(float(row["result_error"]) for row in rows)
            size = float(rows[0]["bytes_per_weight"])
            print(f"{name:9} {kind:13} {size:12.4f} {errors[0]:7.4f} {errors[len(errors) // 2]:7.4f} {errors[-1]:7.4f}")


if __name__ == "__main__":
    main()
