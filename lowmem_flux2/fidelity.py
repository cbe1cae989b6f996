"""``lowmem-flux2 bench --fidelity``: what each choice that changes pixels costs, measured on pictures.

The same prompts, seeds and plan for every variant, one thing changed. Beside them controls that show how far apart
pictures are anyway: another seed, another prompt, half the steps. Results of a variant are kept in the output folder
as they come, so a run that is cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from lowmem_flux2.arguments import read_prompts
from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.sources import ASSETS, EMBEDDED
from lowmem_flux2.report import write_atomically
from lowmem_flux2.runtime.contact_sheet import Row, contact_sheet
from lowmem_flux2.runtime.engine import Engine
from lowmem_flux2.runtime.similarity import Pictures, lpips_measure, psnr_db, relative_error, ssim
from lowmem_flux2.runtime.versions import versions
from lowmem_flux2.variants import Setting, Variant, variants

Score = Callable[[Pictures, Sequence[str]], NDArray[np.float64]]
"""Pictures and their prompts to one number a picture, higher is better."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a variant made: pictures (n, h, w, 3) in [0, 1], packed latents (n, tokens, channels), denoising seconds,
    blocks computed, and which steps were skipped (batches, steps)."""

    pictures: Pictures
    latents: NDArray[np.float32]
    denoise_s: float
    computed_blocks: int
    skipped: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Figures:
    """A variant against its reference. PSNR is None where every picture is equal; ``worst`` is over the images.

    ``time_ratio``: seconds of the denoise stage without loading, over the reference's, in this run. ``blocks_ratio``:
    transformer blocks computed, over the reference's; ``skipped_steps``: of each batch, counted from 0.
    """

    name: str
    kind: str
    against: str
    images: int
    equal_images: int
    psnr_db_median: float | None
    psnr_db_worst: float | None
    ssim_median: float
    ssim_worst: float
    latents_error_median: float
    latents_error_worst: float
    time_ratio: float
    score_mean: float | None
    lpips_median: float | None
    lpips_worst: float | None
    blocks_ratio: float
    skipped_steps: Sequence[Sequence[int]]


def prompts_for(model: str, file: Path | None, images: int) -> tuple[str, ...]:
    """As many prompts as pictures: those of the file, in turn; without one, the embedded model's own.

    Raises:
        UsageError: no file for another model, or nothing in it.
    """
    if file is None and model != EMBEDDED:
        raise UsageError(f"bench --fidelity -m {model}: which prompts? Give a file with one a line: --prompt-file FILE")
    found = read_prompts(None, file or ASSETS / EMBEDDED / "prompts.txt")
    return tuple(found[number % len(found)] for number in range(images))


def measure_fidelity(
    setting: Setting,
    folder: Path,
    console: Console,
    *,
    stem: str = "fidelity",
    more: Sequence[Variant] = (),
    score: Score | None = None,
) -> list[Figures]:
    """Run every variant and write ``STEM.json``, ``STEM.md`` and ``STEM.png`` (a contact sheet) into the folder.

    Args:
        more: further variants, after the usual ones.
        score: of single pictures, where the model's pictures can be judged by themselves.

    Raises:
        UsageError: scikit-image is not installed.
    """
    ssim(np.zeros((1, 16, 16, 3), np.float32), np.zeros((1, 16, 16, 3), np.float32))  # or fail before any work
    folder.mkdir(parents=True, exist_ok=True)
    with _engine(setting, dtype=setting.dtype) as engine:
        request = engine.request(
            list(setting.prompts),
            width=setting.width or None,
            height=setting.height or None,
            num_inference_steps=setting.steps or None,
        )
        setting = replace(
            setting,
            dtype=engine.plan(request).stage("denoise").compute_dtype,
            width=request.width,
            height=request.height,
            steps=request.num_inference_steps,
        )
    chosen = [*variants(setting, setting.width, setting.height), *more]
    lpips = lpips_measure()
    samples: dict[str, Sample] = {}
    found: list[Figures] = []
    rows: list[Row] = []
    for variant in chosen:
        console.print(f"{variant.name} ...")
        sample = _kept(setting, variant, folder / f"{stem}-samples")
        if any(other.against == variant.name for other in chosen):
            samples[variant.name] = sample
        base = samples[variant.against if variant.kind != "reference" else variant.name]
        figures = _compare(setting, variant, sample, base, score, lpips)
        found.append(figures)
        if variant.kind not in ("reference", "control") and figures.psnr_db_worst is not None:
            worst = int(np.argmin(psnr_db(sample.pictures, base.pictures)))
            title = f"{variant.name}: the worst of {figures.images}, {figures.psnr_db_worst:.1f} dB"
            rows.append(Row(title, base.pictures[worst], sample.pictures[worst]))
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "setting": setting.to_json(),
        "versions": versions(),
        "results": [asdict(one) for one in found],
    }
    write_atomically(folder / f"{stem}.json", json.dumps(record, indent=2) + "\n")
    write_atomically(folder / f"{stem}.md", markdown(found))
    if rows:
        contact_sheet(rows).save(folder / f"{stem}.png", optimize=True)
    console.print(_table(found, console.width))
    console.print(f"wrote {folder / stem}.json, .md and .png", soft_wrap=True)
    return found


def _kept(setting: Setting, variant: Variant, folder: Path) -> Sample:
    """A variant's pictures and latents: from the folder if they are there, else made and kept there."""
    made_of = json.dumps([setting.to_json(), asdict(variant), versions()], sort_keys=True)
    path = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        sample = _make(setting, variant)
        folder.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        kept: dict[str, NDArray[Any]] = {
            # safetensors writes memory as it lies, and channels may lie first.
            "pictures": np.round(sample.pictures * 65535).astype(np.uint16, order="C"),
            "latents": sample.latents,
            "denoise_s": np.array([sample.denoise_s]),
            "computed_blocks": np.array([sample.computed_blocks]),
            "skipped": sample.skipped,
        }
        save_file(kept, temporary)
        temporary.replace(path)
    found = load_file(path)
    pictures, blocks = (found["pictures"] / 65535).astype(np.float32), int(found["computed_blocks"][0])
    return Sample(pictures, found["latents"], float(found["denoise_s"][0]), blocks, found["skipped"])


def _engine(setting: Setting, **choices: Any) -> Engine:
    return Engine(
        setting.model,
        profile=setting.profile,
        device=setting.device,
        max_vram=setting.max_vram,
        max_ram=setting.max_ram,
        cache_dir=setting.cache,
        **choices,
    )


def _make(setting: Setting, variant: Variant) -> Sample:
    batches: list[torch.Tensor] = []

    def note(_: object, step: int, __: torch.Tensor, kept: dict[str, torch.Tensor]) -> None:
        if step == 0:
            batches.append(kept["latents"])
        batches[-1] = kept["latents"]

    count, rotation, steps = len(setting.prompts), variant.rotation, max(1, setting.steps // variant.steps_divisor)
    plain = variant.dtype or setting.dtype
    with _engine(
        setting,
        dtype=plain,
        weight_format=variant.weight_format or plain,
        text_weight_format=variant.text_weight_format or plain,
        step_cache=variant.step_cache,
        vae_tile=variant.vae_tile,
        batch_size=setting.batch,
    ) as engine:
        made = engine.generate(
            [setting.prompts[(number + rotation) % count] for number in range(count)],
            generator=[torch.Generator().manual_seed(setting.seed + variant.shift + i) for i in range(count)],
            width=setting.width * variant.scale,
            height=setting.height * variant.scale,
            num_inference_steps=steps,
            output_type="np",
            callback_on_step_end=note,
        )
    denoise = next(stage for stage in made.report.stages if stage.stage == "denoise")
    latents = torch.cat([batch.to("cpu", torch.float32) for batch in batches]).numpy()
    skipped = np.array([[step in batch for step in range(steps)] for batch in denoise.skipped_steps])
    pictures = made.images.astype(np.float32)
    return Sample(pictures, latents, denoise.time_s - denoise.load_s, denoise.computed_blocks, skipped)


def _compare(
    setting: Setting,
    variant: Variant,
    sample: Sample,
    base: Sample,
    score: Score | None,
    lpips: Callable[[Pictures, Pictures], NDArray[np.float64]] | None,
) -> Figures:
    psnr, similar = psnr_db(sample.pictures, base.pictures), ssim(sample.pictures, base.pictures)
    error = relative_error(sample.latents, base.latents) if sample.latents.shape == base.latents.shape else None
    distance = lpips(sample.pictures, base.pictures) if lpips else None
    count, rotation = len(setting.prompts), variant.rotation
    prompts = [setting.prompts[(number + rotation) % count] for number in range(count)]
    return Figures(
        name=variant.name,
        kind=variant.kind,
        against=variant.against,
        images=count,
        equal_images=int(np.isinf(psnr).sum()),
        psnr_db_median=_finite(np.median(psnr)),
        psnr_db_worst=_finite(psnr.min()),
        ssim_median=float(np.median(similar)),
        ssim_worst=float(similar.min()),
        latents_error_median=float(np.median(error)) if error is not None else math.nan,
        latents_error_worst=float(error.max()) if error is not None else math.nan,
        time_ratio=sample.denoise_s / base.denoise_s,
        score_mean=float(score(sample.pictures, prompts).mean()) if score and variant.scale == 1 else None,
        lpips_median=float(np.median(distance)) if distance is not None else None,
        lpips_worst=float(distance.max()) if distance is not None else None,
        blocks_ratio=sample.computed_blocks / base.computed_blocks,
        skipped_steps=[np.flatnonzero(batch).tolist() for batch in sample.skipped],
    )


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


HEADINGS = (
    "variant",
    "against",
    "equal",
    "PSNR median",
    "PSNR worst",
    "SSIM median",
    "SSIM worst",
    "latents median",
    "latents worst",
    "blocks ratio",
    "time ratio",
    "score",
)


def _cells(one: Figures) -> tuple[str, ...]:
    def decibels(value: float | None) -> str:
        return "equal" if value is None else f"{value:.1f} dB"

    return (
        one.name,
        one.against if one.kind != "reference" else "",
        f"{one.equal_images}/{one.images}",
        decibels(one.psnr_db_median),
        decibels(one.psnr_db_worst),
        f"{one.ssim_median:.4f}",
        f"{one.ssim_worst:.4f}",
        f"{one.latents_error_median:.4f}",
        f"{one.latents_error_worst:.4f}",
        f"{one.blocks_ratio:.2f}",
        f"{one.time_ratio:.2f}",
        "" if one.score_mean is None else f"{one.score_mean:.3f}",
    )


def markdown(found: Sequence[Figures]) -> str:
    """The table as markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(_cells(one)) + " |" for one in found]
    return "\n".join(lines) + "\n"


NARROW = ("variant", "PSNR median", "PSNR worst", "SSIM worst", "latents worst", "time ratio")
"""Columns of a terminal that is too narrow for all; the files have all."""


def _table(found: Sequence[Figures], width: int) -> Table:
    shown = HEADINGS if width >= 130 else NARROW
    table = Table(show_edge=False, pad_edge=False)
    for heading in shown:
        table.add_column(heading, justify="left" if heading in ("variant", "against") else "right")
    for one in found:
        cells = dict(zip(HEADINGS, _cells(one), strict=True))
        table.add_row(*(cells[heading] for heading in shown))
    return table


def read_results(path: Path) -> list[Figures]:
    """What ``measure_fidelity`` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    return [Figures(**cast(dict[str, Any], one)) for one in raw["results"]]
