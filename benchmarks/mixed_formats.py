"""Does a mixture of weight formats beat plain nf4 in nf4's bytes? Measured on the trained `shapes` checkpoint.

    python benchmarks/mixed_formats.py --out benchmarks/results

Sensitivity first: each Linear of the transformer's blocks alone in 4 bits, on the prompts that the checkpoint ships
with, and the mean square of the latents' relative error over that of the weight's. To first order the errors of Linears
add in squares, so what a mixture costs is the sum over Linears of sensitivity x squared weight error. Then tried
beside plain nf4, on prompts and noise that nothing was chosen by:

- nf4-mixed, the format of the package, whose rule is in `planning.mixed`;
- its parts apart: nf4 with its scales searched, and the rule's bits with the absmax for a scale;
- the mixture of 3, 4 and 5 bits with the least sum in nf4's bytes, Linear by Linear: what a rule might gain.

Each picture is compared with that of unquantized weights: its PSNR, and its latents' relative error in dB, less those
of plain nf4 for the same prompt and seed; of both the mean over pictures, with a 95 % bootstrap interval. It says which
is better on this checkpoint; of others it says nothing. Writes mixed-formats.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "shapes"))

from draw import sample_specs  # noqa: E402

from lowmem_flux2.fidelity import prompts_for  # noqa: E402
from lowmem_flux2.planning.formats import FORMATS, MIXED, NF4_BLOCK  # noqa: E402
from lowmem_flux2.planning.linears import linears_of  # noqa: E402
from lowmem_flux2.planning.mixed import mixed_bits, mixed_blocks  # noqa: E402
from lowmem_flux2.planning.sources import ASSETS, EMBEDDED, resolve_model  # noqa: E402
from lowmem_flux2.report import write_atomically  # noqa: E402
from lowmem_flux2.runtime.engine import Engine  # noqa: E402
from lowmem_flux2.runtime.normal_float import Levels  # noqa: E402
from lowmem_flux2.runtime.quantize import MIXED_LINEARS  # noqa: E402
from lowmem_flux2.runtime.similarity import psnr_db, relative_error  # noqa: E402
from lowmem_flux2.runtime.versions import versions  # noqa: E402

CHOICE_SEED, TEST_SEED, PROMPTS_SEED = 9000, 1_900_000, 11
BATCH = 16
RESAMPLES = 10_000
BITS = {3: 3.127, 4: 4.127, 5: 5.127}
"""Bits a weight with scales at FLUX.2's widths."""

Made = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Pictures (n, h, w, 3), and their latents (n, tokens, channels)."""


def rounded(weight: torch.Tensor, bits: int, searched: bool = True) -> torch.Tensor:
    """(rows, columns) in fp32 as the stored form of so many bits gives it back."""
    rows, columns = weight.shape
    if not searched:
        levels, blocks = Levels.normal(bits), weight.reshape(-1, NF4_BLOCK)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        return (levels.values[levels.nearest(blocks / absmax).int()] * absmax).view(rows, columns)
    linear = MIXED_LINEARS[bits](nn.Linear(columns, rows, bias=False, device="meta"), torch.float32)
    linear._buffers.update(MIXED_LINEARS[bits].quantize(weight, torch.float32))
    return linear.dequantize()


class Shapes:
    """The embedded checkpoint, in fp32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.copytree(ASSETS / EMBEDDED, folder / "model")
        self._path = next((folder / "model" / "transformer").glob("*.safetensors"))
        self._plain = {name: tensor.float() for name, tensor in load_file(self._path).items()}
        dims = resolve_model(EMBEDDED, offline=True).spec.transformer
        self.sizes = {name: rows * columns for name, (rows, columns) in linears_of(dims).items() if "blocks." in name}

    def weight(self, name: str) -> torch.Tensor:
        return self._plain[f"{name}.weight"]

    def weight_error(self, name: str, bits: int) -> float:
        """Relative, squared."""
        weight = self.weight(name)
        return float((rounded(weight, bits) - weight).square().sum() / weight.square().sum())

    def rule(self) -> dict[str, int]:
        """Bits of each Linear in nf4-mixed."""
        blocks: dict[str, dict[str, int]] = {}
        for name, size in self.sizes.items():
            kind, index, rest = name.split(".", 2)
            blocks.setdefault(f"{kind}.{index}", {})[rest] = size
        found = zip(blocks, mixed_bits(list(blocks.values())), strict=True)
        chosen = {f"{block}.{name}": bits for block, each in found for name, bits in each.items()}
        return {name: chosen.get(name, 4) for name in self.sizes}

    def with_bits(self, bits: Mapping[str, int], prompts: Sequence[str], seed: int, searched: bool = True) -> Made:
        """Pictures with the named Linears rounded."""
        changed = {f"{name}.weight": rounded(self.weight(name), count, searched) for name, count in bits.items()}
        save_file(self._plain | changed, self._path, metadata={"format": "pt"})
        return self._made(str(self._folder / "model"), "fp32", prompts, seed)

    def in_format(self, weight_format: str, prompts: Sequence[str], seed: int) -> Made:
        """Pictures in a format of the package."""
        return self._made(EMBEDDED, weight_format, prompts, seed)

    def _made(self, model: str, weight_format: str, prompts: Sequence[str], seed: int) -> Made:
        batches: list[torch.Tensor] = []

        def note(_: object, step: int, __: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
            batches[len(batches) - (step > 0) :] = [kept["latents"]]

        with Engine(
            model,
            device="cpu",
            dtype="fp32",
            weight_format=weight_format,
            text_weight_format="fp32",
            batch_size=BATCH,
            cache_dir=self._folder / "cache",
        ) as engine:
            made = engine.generate(
                list(prompts),
                generator=[torch.Generator().manual_seed(seed + index) for index in range(len(prompts))],
                output_type="np",
                callback_on_step_end=note,
            )
        return made.images.astype(np.float32), torch.cat(batches).float().numpy()


def best_bits(costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int]) -> dict[str, int]:
    """The bits of each Linear with the least sum of costs in nf4's bytes: each bit more costs the same a weight, so
    dynamic programming over what is spent beyond the least, in units that all sizes are multiples of."""
    unit = int(np.gcd.reduce(list(sizes.values())))
    budget = sum(sizes.values()) // unit  # one bit a weight more than 3
    least = np.zeros(budget + 1)
    picks: list[NDArray[np.int64]] = []
    for name, size in sizes.items():
        options = np.full((len(BITS), budget + 1), np.inf)
        for row, bits in enumerate(BITS):
            spent = row * size // unit
            options[row, spent:] = least[: budget + 1 - spent] + costs[name][bits]
        picks.append(options.argmin(axis=0))
        least = options.min(axis=0)
    chosen, left = {}, budget
    for (name, size), pick in reversed(list(zip(sizes.items(), picks, strict=True))):
        row = int(pick[left])
        chosen[name] = list(BITS)[row]
        left -= row * size // unit
    return {name: chosen[name] for name in sizes}


def interval(gains: NDArray[np.float64]) -> dict[str, float]:
    """Mean over pictures, and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(gains), (RESAMPLES, len(gains)))
    low, high = np.percentile(gains[draws].mean(axis=1), (2.5, 97.5))
    return {"mean_db": float(gains.mean()), "low_db": float(low), "high_db": float(high)}


def compared(made: Made, plain: Made, nf4: Made) -> dict[str, Any]:
    """Figures of a variant beside unquantized weights, and its gain over nf4."""
    psnr, base = (psnr_db(each[0], plain[0]) for each in (made, nf4))
    error, base_error = (relative_error(each[1], plain[1]) for each in (made, nf4))
    return {
        "psnr_db_median": float(np.median(psnr)),
        "psnr_db_worst": float(psnr.min()),
        "latents_error_median": float(np.median(error)),
        "latents_error_rms": float(np.sqrt(np.mean(np.square(error)))),
        "latents_error_worst": float(error.max()),
        "psnr_gain": interval(psnr - base),
        "latents_gain": interval(-20 * np.log10(error / base_error)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=int, default=16, help="that sensitivities are measured on")
    parser.add_argument("--test-images", type=int, default=128, help="that the mixtures are tried on")
    arguments = parser.parse_args()
    known = prompts_for(EMBEDDED, None, arguments.images)
    seen = set(prompts_for(EMBEDDED, None, 64))
    fresh = [each.prompt for each in sample_specs(2 * arguments.test_images, PROMPTS_SEED) if each.prompt not in seen]
    fresh = fresh[: arguments.test_images]
    with TemporaryDirectory() as temporary:
        shapes = Shapes(Path(temporary))
        plain = shapes.with_bits({}, known, CHOICE_SEED)[1]
        rule, costs, rows = shapes.rule(), {}, []
        for name, size in shapes.sizes.items():
            errors = relative_error(shapes.with_bits({name: 4}, known, CHOICE_SEED)[1], plain)
            squared = float(np.mean(np.square(errors)))
            weight = {bits: shapes.weight_error(name, bits) for bits in BITS}
            costs[name] = {bits: squared * weight[bits] / weight[4] for bits in BITS}
            rows.append({"linear": name, "weights": size, "latents_error": squared**0.5, "bits": rule[name]})
            print(f"{name:50} {size:7} latents error in 4 bits {squared**0.5:.5f}, {rule[name]} bits", flush=True)
        best = best_bits(costs, shapes.sizes)
        usual = dict.fromkeys(shapes.sizes, 4)
        test = (fresh, TEST_SEED)
        plain_made, nf4 = shapes.in_format("fp32", *test), shapes.in_format("nf4", *test)
        tried = {
            "nf4": nf4,
            MIXED: shapes.in_format(MIXED, *test),
            "nf4, searched scales": shapes.with_bits(usual, *test),
            f"{MIXED}, absmax for scales": shapes.with_bits(rule, *test, searched=False),
            "best by measured sensitivity": shapes.with_bits(best, *test),
        }
        results = {name: compared(made, plain_made, nf4) for name, made in tried.items()}
        results[MIXED]["psnr_gain_over_searched_scales"] = interval(
            psnr_db(tried[MIXED][0], plain_made[0]) - psnr_db(tried["nf4, searched scales"][0], plain_made[0])
        )
        for name, found in results.items():
            gain = found["psnr_gain"]
            print(
                f"{name:32} {found['psnr_db_median']:.2f} dB, worst {found['psnr_db_worst']:.2f}, gain over nf4",
                end=" ",
            )
            print(f"{gain['mean_db']:+.2f} [{gain['low_db']:+.2f}, {gain['high_db']:+.2f}] dB")
    stored = {
        model: {
            "nf4": sum(FORMATS["nf4"].block_bytes(block) for block in dims.blocks),
            MIXED: sum(FORMATS[MIXED].block_bytes(block) for block in mixed_blocks(dims)),
        }
        for model in (EMBEDDED, "flux2-klein-4b", "flux2-klein-9b", "flux2-dev")
        for dims in (resolve_model(model, offline=True).spec.transformer,)
    }
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": arguments.images,
        "test_images": len(fresh),
        "bits": BITS,
        "linears": [{**row, "best_bits": best[str(row["linear"])]} for row in rows],
        "stored_bytes": stored,
        "results": results,
        "versions": versions(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "mixed-formats.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
