"""Does a mixture of weight formats beat plain nf4 in nf4's bytes? Measured on the trained `shapes` checkpoint.

    python benchmarks/mixed_formats.py --out benchmarks/results

The transformer's Linears fall into groups: of each double-stream block the projections, outputs and the two halves of
the feed-forward of either stream, of each single-stream block its two Linears. Each group alone in nf4 gives its
sensitivity: the mean square of the latents' relative error over that of its weights. To first order the errors of
groups add in squares, so a mixture's is the sum over groups of sensitivity x squared weight error of the group's
format. The mixture of 3, 4, 6 and 8 bits with the least sum in no more bytes than nf4's is then run, on other seeds
than it was chosen by, beside plain nf4 and beside nf4 with each absmax scaled for the least square error (as many
bytes). Writes mixed-formats.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem_flux2.fidelity import prompts_for
from lowmem_flux2.planning.sources import ASSETS, EMBEDDED
from lowmem_flux2.report import write_atomically
from lowmem_flux2.runtime.engine import Engine
from lowmem_flux2.runtime.quantize import STORED
from lowmem_flux2.runtime.similarity import relative_error
from lowmem_flux2.runtime.versions import versions

ROOT = Path(__file__).resolve().parents[1]
FIRST_SEED, OTHER_SEED = 9000, 500
CLIPS = (0.8, 0.84, 0.88, 0.92, 0.96, 1.0)
"""Of a block's absmax, tried for the scale with the least square error."""
BLOCK = 64

Quantizer = Callable[[torch.Tensor], torch.Tensor]
"""A weight to what its stored form gives back, both fp32."""


def stored(name: str) -> Quantizer:
    """A format of the package."""

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        linear = STORED[name](nn.Linear(columns, rows, bias=False, device="meta"), torch.float32)
        linear._buffers.update(STORED[name].quantize(weight, torch.float32))
        return linear.dequantize().contiguous()

    return quantized


def normal_levels(bits: int) -> torch.Tensor:
    """NormalFloat levels (QLoRA, arXiv:2305.14314, section 3), from -1 to 1 with a zero."""
    half = 2 ** (bits - 1)
    offset = 0.5 * (1 - 1 / (2 * 2**bits - 2) + 1 - 1 / (2 * 2**bits))
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, half + 1)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, half)[:-1])
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    return levels / levels.abs().max()


def normal_float(bits: int, clips: tuple[float, ...] = (1.0,)) -> Quantizer:
    """NormalFloat with an absmax per 64 weights in 8 bits of its own maximum, and the best of some clips of it."""
    levels = normal_levels(bits)

    def quantized(weight: torch.Tensor) -> torch.Tensor:
        blocks = weight.reshape(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        best, least = torch.zeros_like(blocks), torch.full_like(absmax, torch.inf)
        for clip in clips:
            scale = (clip * absmax / absmax.max() * 255).round().clamp_(min=1) * absmax.max() / 255
            found = levels[((blocks / scale).unsqueeze(-1) - levels).abs().argmin(dim=-1)] * scale
            error = (found - blocks).square().sum(dim=1, keepdim=True)
            best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        return best.reshape(weight.shape)

    return quantized


BITS = {"nf3": 3.127, "nf4": 4.127, "int6": 6.25, "int8": 8.0}
"""Bits a weight with scales at FLUX.2's widths (planning.formats; nf3 as nf4 with a bit less)."""
FORMS: dict[str, Quantizer] = {
    "nf3": normal_float(3),
    "nf4": stored("nf4"),
    "int6": stored("int6"),
    "int8": stored("int8"),
    "nf4, searched scales": normal_float(4, CLIPS),
}


def group_of(name: str) -> str | None:
    """The group that a tensor of the transformer belongs to; None where it is not quantized."""
    if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")) or "norm" in name:
        return None
    block, _, rest = name.removesuffix(".weight").partition(".attn.")
    if not rest:
        return name.removesuffix(".weight")
    kinds = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv"}
    kinds |= {"add_q_proj": "added qkv", "add_k_proj": "added qkv", "add_v_proj": "added qkv", "to_out.0": "to_out"}
    return f"{block}.{kinds.get(rest, rest)}"


class Shapes:
    """The embedded checkpoint with some of its Linears rounded, in fp32."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shutil.copytree(ASSETS / EMBEDDED, folder / "model")
        self._path = next((folder / "model" / "transformer").glob("*.safetensors"))
        self._plain = {name: tensor.float() for name, tensor in load_file(self._path).items()}
        self.groups: dict[str, list[str]] = {}
        for name in self._plain:
            if (group := group_of(name)) is not None:
                self.groups.setdefault(group, []).append(name)
        self.sizes = {group: sum(self._plain[name].numel() for name in names) for group, names in self.groups.items()}

    def weight_error(self, group: str, form: str) -> float:
        """Relative, squared."""
        pairs = [(self._plain[name], FORMS[form](self._plain[name])) for name in self.groups[group]]
        return float(
            sum((one - other).square().sum() for one, other in pairs) / sum(w.square().sum() for w, _ in pairs)
        )

    def latents(self, forms: Mapping[str, str], seed: int, images: int) -> NDArray[np.float32]:
        """Final latents with each named group in its format."""
        tensors = dict(self._plain)
        for group, form in forms.items():
            tensors |= {name: FORMS[form](self._plain[name]) for name in self.groups[group]}
        save_file(tensors, self._path, metadata={"format": "pt"})
        with Engine(
            str(self._folder / "model"), dtype="fp32", cache_dir=self._folder / "cache", device="cpu"
        ) as engine:
            made = engine.generate(
                list(prompts_for(EMBEDDED, None, images)),
                generator=[torch.Generator().manual_seed(seed + index) for index in range(images)],
                output_type="latent",
            )
        latents: NDArray[np.float32] = made.images.float().flatten(1).unsqueeze(1).numpy()
        return latents


def allocation(costs: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int]) -> dict[str, str]:
    """The format of each group with the least sum of costs in nf4's bits or less, by a Lagrange multiplier."""
    budget = BITS["nf4"] * sum(sizes.values())
    best = dict.fromkeys(sizes, "nf4")

    def total(chosen: Mapping[str, str]) -> float:
        return sum(costs[group][form] for group, form in chosen.items())

    for price in np.geomspace(1e-12, 1e3, 600):
        chosen = {g: min(BITS, key=lambda form: costs[g][form] + price * BITS[form] * sizes[g]) for g in sizes}
        bits = sum(BITS[form] * sizes[group] for group, form in chosen.items())
        if bits <= budget and total(chosen) < total(best):
            best = chosen
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--images", type=int, default=8, help="that sensitivities are measured on")
    parser.add_argument("--test-images", type=int, default=32, help="that the choice is tried on")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        shapes = Shapes(Path(temporary))
        plain = shapes.latents({}, FIRST_SEED, arguments.images)
        rows, costs = [], {}
        for group in shapes.groups:
            errors = relative_error(shapes.latents({group: "nf4"}, FIRST_SEED, arguments.images), plain)
            squared = float(np.mean(np.square(errors)))
            weight = {form: shapes.weight_error(group, form) for form in BITS}
            costs[group] = {form: squared * weight[form] / weight["nf4"] for form in BITS}
            rows.append({"group": group, "weights": shapes.sizes[group], "latents_error": squared**0.5})
            print(f"{group:45} {shapes.sizes[group]:7} latents error in nf4 {squared**0.5:.5f}", flush=True)
        chosen = allocation(costs, shapes.sizes)
        bits = sum(BITS[form] * shapes.sizes[g] for g, form in chosen.items()) / sum(shapes.sizes.values())
        predicted = (
            sum(costs[g][form] for g, form in chosen.items()) / sum(costs[g]["nf4"] for g in shapes.groups)
        ) ** 0.5
        tried = {"nf4": dict.fromkeys(shapes.groups, "nf4"), "mixed": chosen}
        tried["nf4, searched scales"] = dict.fromkeys(shapes.groups, "nf4, searched scales")
        others = shapes.latents({}, OTHER_SEED, arguments.test_images)
        results = {}
        for name, forms in tried.items():
            errors = relative_error(shapes.latents(forms, OTHER_SEED, arguments.test_images), others)
            weight_error = sum(shapes.weight_error(g, form) for g, form in forms.items()) / len(forms)
            results[name] = {
                "latents_error_median": float(np.median(errors)),
                "latents_error_rms": float(np.sqrt(np.mean(np.square(errors)))),
                "latents_error_worst": float(errors.max()),
                "weight_error_mean": weight_error**0.5,
            }
            print(f"{name:22} {results[name]}", flush=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "images": arguments.images,
        "test_images": arguments.test_images,
        "bits": BITS,
        "groups": [{**row, "format": chosen[str(row["group"])]} for row in rows],
        "mixed_bits": bits,
        "predicted_error_ratio": predicted,
        "results": results,
        "versions": versions(),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out / "mixed-formats.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
