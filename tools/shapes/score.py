"""Score the `shapes` checkpoint: do its pictures show what their prompts say?

    python tools/shapes/score.py
    python tools/shapes/score.py --engine stock --n 200 --steps 20 --guidance 2 --sheet sheet.png

The scorer is blind: `read_picture` measures a picture without knowing its prompt, and only `check` compares what it
read with what was asked for. Half of the prompts show colour/shape/background triples that were never trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import (
    COLOURS,
    CROSS_HALF,
    HELD_OUT,
    PICTURE,
    POSITIONS,
    SHAPES,
    SIZES,
    SQUARE_HALF,
    Spec,
    sample_specs,
    signed_distance,
)
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

MODEL = Path(__file__).resolve().parents[2] / "lowmem_flux2" / "assets" / "shapes"
BATCH = 20
ATTRIBUTES = ("colour", "background", "shape", "size", "position")
CHECKS = (*ATTRIBUTES, "all")

LEAST_CONTRAST = 0.2
"""Distance in RGB below which a picture counts as plain."""
COLOUR_TOLERANCE = 45 / 255
"""Greatest deviation of a channel from a named colour."""
PAPER_UNEVEN = 0.07
INK_UNEVEN = 0.12
"""Greatest root mean square deviation of the background and of the shape from their own colours."""
LEAST_FIT = 0.8
"""Least overlap (intersection over union) of a shape with its ideal."""
FAINT = 0.15
"""Cover below which a pixel counts as background."""
HEIGHT_TOLERANCE = 5.0
"""Greatest vertical distance of a shape from the middle, in pixels."""

AREAS = {
    "circle": math.pi,
    "square": (2 * SQUARE_HALF) ** 2,
    "triangle": 2.0,
    "cross": 8 * CROSS_HALF - 4 * CROSS_HALF**2,
}
"""Area of each shape of radius 1."""
CENTROIDS = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}
"""How far below its middle the centroid of each shape of radius 1 lies."""


@dataclass(frozen=True)
class Reading:
    """What a picture shows, measured without knowledge of its prompt; None where nothing clear was found."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    position: str | None = None
    background: str | None = None
    fit: float = 0.0
    radius: float = 0.0
    x: float = 0.0
    y: float = 0.0


def read_picture(picture: NDArray[Any] | Tensor) -> Reading:
    """Measure one picture: (height, width, 3), in [0, 1] or as bytes."""
    pixels = torch.as_tensor(picture)
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if pixels.shape != (PICTURE, PICTURE, 3):
        raise ValueError(f"expected a picture of {PICTURE}x{PICTURE}x3, got {tuple(pixels.shape)}")

    border = torch.cat([pixels[:2].flatten(0, 1), pixels[-2:].flatten(0, 1), pixels[:, 0], pixels[:, -1]])
    paper = border.median(0).values
    contrast = (pixels - paper).norm(dim=-1)
    peak = contrast.quantile(0.99)
    if peak < LEAST_CONTRAST:
        return Reading(background=name_colour(paper, pixels, PAPER_UNEVEN))
    core = _shrunk(contrast > peak / 2)
    if not core.any():
        return Reading(background=name_colour(paper, pixels[contrast <= peak / 2], PAPER_UNEVEN))
    ink = pixels[core].median(0).values

    span = ink - paper
    cover = ((pixels - paper) @ span / span.dot(span)).clamp(0, 1)
    cover = torch.where(cover < FAINT, 0.0, cover)
    fits = {shape: _fit(shape, cover) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    fit, radius, x, y = fits[shape]
    ideal = _cover(shape, radius, x, y)
    outside, inside = _shrunk(_shrunk(ideal == 0)), _shrunk(ideal == 1)
    return Reading(
        size=_name_size(radius),
        colour=name_colour(ink, pixels[inside], INK_UNEVEN),
        shape=shape if fit >= LEAST_FIT else None,
        position=_name_position(x, y),
        background=name_colour(paper, pixels[outside], PAPER_UNEVEN),
        fit=fit,
        radius=radius,
        x=x,
        y=y,
    )


def name_colour(colour: Tensor, pixels: Tensor, unevenness: float) -> str | None:
    """The name of a colour that the pixels are evenly painted in, or None if it has none or they are uneven."""
    if pixels.numel() == 0 or (pixels - colour).square().mean().sqrt() > unevenness:
        return None
    for name, nominal in COLOURS.items():
        if (colour - torch.tensor(nominal) / 255).abs().max() <= COLOUR_TOLERANCE:
            return name
    return None


def _shrunk(mask: Tensor) -> Tensor:
    """The pixels of a mask all of whose neighbours belong to it too; the mask goes on beyond the picture."""
    return functional.max_pool2d((~mask)[None, None].float(), 3, 1, 1)[0, 0] == 0


def _cover(shape: str, radius: float, x: float, y: float) -> Tensor:
    """How far each pixel is covered by an ideal shape."""
    axis = torch.arange(PICTURE) + 0.5
    return (0.5 - signed_distance(shape, (axis - x)[None, :], (axis - y)[:, None], radius)).clamp(0, 1)


def _fit(shape: str, cover: Tensor) -> tuple[float, float, float, float]:
    """Fit a shape by area and centroid: (overlap, radius, x, y)."""
    axis = torch.arange(PICTURE) + 0.5
    area = float(cover.sum())
    x = float((cover * axis[None, :]).sum()) / area
    y = float((cover * axis[:, None]).sum()) / area
    radius = (area / AREAS[shape]) ** 0.5
    y -= CENTROIDS[shape] * radius
    ideal = _cover(shape, radius, x, y)
    return float(torch.minimum(cover, ideal).sum() / torch.maximum(cover, ideal).sum()), radius, x, y


def _name_size(radius: float) -> str | None:
    for name, (low, high) in SIZES.items():
        if low - 1.25 <= radius < high + 1.25:
            return name
    return None


def _name_position(x: float, y: float) -> str | None:
    if abs(y - PICTURE / 2) > HEIGHT_TOLERANCE:
        return None
    name = min(POSITIONS, key=lambda phrase: abs(x - POSITIONS[phrase]))
    return name if abs(x - POSITIONS[name]) <= 6 else None


def check(reading: Reading, spec: Spec) -> dict[str, bool]:
    """Compare what a picture shows with what was asked for, attribute by attribute and in all."""
    result = {name: getattr(reading, name) == getattr(spec, name) for name in ATTRIBUTES}
    return result | {"all": all(result.values())}


Generate = Callable[[list[str], list[torch.Generator]], NDArray[np.float32]]


def generate_all(generate: Generate, specs: Sequence[Spec], seed: int) -> NDArray[np.float32]:
    """Generate a picture per spec, in batches; picture i from its own generator, seeded seed + i."""
    batches = []
    for start in range(0, len(specs), BATCH):
        batch = specs[start : start + BATCH]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        batches.append(np.asarray(generate([spec.prompt for spec in batch], generators)))
    return np.concatenate(batches)


def pictures_of_stock(
    model: Path, specs: Sequence[Spec], seed: int, steps: int | None, guidance: float | None
) -> NDArray[np.float32]:
    """Pictures of the stock diffusers pipeline, in fp32."""
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((model / "lowmem_flux2.json").read_text())
    call = {
        "height": defaults["height"],
        "width": defaults["width"],
        "max_sequence_length": defaults["max_sequence_length"],
        "num_inference_steps": steps or defaults["num_inference_steps"],
        "guidance_scale": defaults["guidance_scale"] if guidance is None else guidance,
    }

    def generate(prompts: list[str], generators: list[torch.Generator]) -> NDArray[np.float32]:
        images: NDArray[np.float32] = pipeline(prompt=prompts, generator=generators, output_type="np", **call).images
        return images

    return generate_all(generate, specs, seed)


def pictures_of_lowmem(
    model: Path, specs: Sequence[Spec], seed: int, steps: int | None, guidance: float | None
) -> NDArray[np.float32]:
    """Pictures of our own engine, in fp32."""
    from lowmem_flux2 import Engine

    call: dict[str, Any] = {}
    if steps is not None:
        call["num_inference_steps"] = steps
    if guidance is not None:
        call["guidance_scale"] = guidance
    with Engine(model=str(model), device="cpu", dtype="fp32") as engine:

        def generate(prompts: list[str], generators: list[torch.Generator]) -> NDArray[np.float32]:
            result = engine.generate(prompt=prompts, generator=generators, output_type="np", **call)
            images: NDArray[np.float32] = result.images
            return images

        return generate_all(generate, specs, seed)


def pass_rates(results: Sequence[dict[str, bool]]) -> str:
    """The share of pictures that pass each check, as a row of a table."""
    return "".join(f"{100 * sum(r[name] for r in results) / max(1, len(results)):11.1f}" for name in CHECKS)


def print_scores(
    engine: str, specs: Sequence[Spec], results: Sequence[dict[str, bool]], readings: Sequence[Reading]
) -> None:
    """Print the rates of all pictures and of the held-out ones, and how well the shapes fit their ideals."""
    held_out = [result for result, spec in zip(results, specs, strict=True) if spec.triple in HELD_OUT]
    fit = sum(reading.fit for reading in readings) / max(1, len(readings))
    print(f"{engine}: {len(specs)} pictures, mean fit {fit:.3f}; passed, %")
    print(f"{'':10}" + "".join(f"{name:>11}" for name in CHECKS))
    print(f"{'all':10}" + pass_rates(results))
    print(f"{'held-out':10}" + pass_rates(held_out), flush=True)


def psnr(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """PSNR in dB of each picture of one batch against that of another."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).reshape(len(a), -1).mean(1)
    result: NDArray[np.float64] = 10 * np.log10(1 / np.maximum(error, 1e-12))
    return result


def contact_sheet(
    pictures: NDArray[np.float32], specs: Sequence[Spec], results: Sequence[dict[str, bool]], columns: int = 10
) -> Image.Image:
    """All pictures with their prompts, and in red what failed."""
    cell, line = 2 * PICTURE, 11
    width, height = cell + 4, cell + 3 * line + 4
    sheet = Image.new("RGB", (columns * width, math.ceil(len(specs) / columns) * height), (128, 128, 128))
    pen = ImageDraw.Draw(sheet)
    for i, (picture, spec, result) in enumerate(zip(pictures, specs, results, strict=True)):
        x, y = i % columns * width + 2, i // columns * height + 2
        image = Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8))
        sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        star = "*" if spec.triple in HELD_OUT else ""
        pen.text((x, y + cell), f"{star}{spec.size} {spec.colour} {spec.shape}".strip(), fill="white")
        pen.text((x, y + cell + line), f"{spec.position[3:]} on {spec.background}", fill="white")
        failed = [name for name in ATTRIBUTES if not result[name]]
        if failed:
            pen.text((x, y + cell + 2 * line), "not " + ", ".join(failed), fill=(255, 60, 60))
    return sheet


def main() -> None:
    """Score the engines named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="number of pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as the checkpoint records)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: as the checkpoint records)")
    parser.add_argument("--engine", choices=("stock", "lowmem", "both"), default="both")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint folder (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet; with both engines, one per engine")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts and, plus i, of picture i")
    options = parser.parse_args()

    specs = sample_specs(options.n, options.seed)
    engines = {"stock": pictures_of_stock, "lowmem": pictures_of_lowmem}
    chosen = list(engines) if options.engine == "both" else [options.engine]
    pictures: dict[str, NDArray[np.float32]] = {}
    for name in chosen:
        start = time.monotonic()
        pictures[name] = engines[name](options.model, specs, options.seed, options.steps, options.guidance)
        print(f"{name}: {time.monotonic() - start:.1f} s")
        readings = [read_picture(picture) for picture in pictures[name]]
        results = [check(reading, spec) for reading, spec in zip(readings, specs, strict=True)]
        print_scores(name, specs, results, readings)
        if options.sheet:
            path = options.sheet
            if len(chosen) > 1:
                path = path.with_name(f"{path.stem}-{name}{path.suffix}")
            contact_sheet(pictures[name], specs, results).save(path)
    if len(chosen) > 1:
        values = psnr(pictures["lowmem"], pictures["stock"])
        print(f"lowmem against stock: PSNR mean {values.mean():.1f} dB, least {values.min():.1f} dB")


if __name__ == "__main__":
    main()
