"""Pictures on disk: names that never overwrite, PNG metadata, whole files or none."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.formats import FORMATS
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import ImageRecord
from lowmem_flux2.runtime.newfile import write_new

FIELDS = ("seed", "index", "model")
LONGEST_NAME_BYTES = 220
"""File systems allow 255; what makes a name unique and temporary is added."""
LONGEST_SEED, LONGEST_INDEX = 2**63 - 1, 9999


class OutputPattern:
    """``out_{seed}.png``: a file name with ``{seed}``, ``{index}`` and ``{model}``.

    Raises:
        UsageError: an unknown field, another suffix than .png, a missing folder or one that cannot be written.
    """

    def __init__(self, pattern: str) -> None:
        try:
            parsed = list(string.Formatter().parse(pattern))
        except ValueError as error:
            raise UsageError(f"--output {pattern}: {error}") from None
        for _, name, spec, conversion in parsed:
            if name is not None and (name not in FIELDS or spec or conversion):
                raise UsageError(f"--output {pattern}: unknown field {{{name}}}; known: {{seed}}, {{index}}, {{model}}")
        path = Path(pattern)
        if path.suffix.lower() != ".png":
            raise UsageError(f"--output {pattern}: pictures are written as .png")
        self._pattern = pattern
        check_writable("--output", self.path(seed=LONGEST_SEED, index=LONGEST_INDEX, model="model"), pattern)

    def __str__(self) -> str:
        return self._pattern

    def path(self, *, seed: int, index: int, model: str) -> Path:
        return Path(self._pattern.format(seed=seed, index=index, model=model.replace("/", "--")))


def check_writable(flag: str, path: Path, shown: str | None = None) -> None:
    """Try a file in the folder: ``os.access`` would say yes to root, and to a file system that is read-only.

    Folders named after ``{model}`` and the like are made when a picture is saved; the nearest one that is there counts.

    Raises:
        UsageError: no such folder, not writable, a folder where a file should be, or a name that is too long.
    """
    named = f"{flag} {shown or path}"
    if len(path.name.encode()) > LONGEST_NAME_BYTES:
        raise UsageError(f"{named}: the file name is longer than {LONGEST_NAME_BYTES} bytes")
    if path.is_dir():
        raise UsageError(f"{named}: this is a folder; give a file name")
    folder = path.parent
    if shown is not None and "{" in str(Path(shown).parent):
        while not folder.exists():
            folder = folder.parent
    if not folder.is_dir():
        raise UsageError(f"{named}: there is no folder {folder}; create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lowmem-flux2-"):
            pass
    except OSError as error:
        raise UsageError(f"{named}: the folder {folder} cannot be written to: {error}") from None


def save_png(picture: Image, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a picture whole or not at all; never over an existing file: ``name.png``, ``name_2.png``, ``name_3.png``...

    Returns:
        The path that was taken.
    """
    made = png_bytes(picture, metadata)
    return write_new(path, lambda file: file.write(made))


def png_bytes(picture: Image, metadata: Mapping[str, str]) -> bytes:
    """A PNG file; the same picture and texts give the same bytes."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    made = BytesIO()
    picture.save(made, format="PNG", pnginfo=info)
    return made.getvalue()


def describe(
    request: Request, plan: Plan, record: ImageRecord, versions: Mapping[str, str], index: int = 0
) -> dict[str, str]:
    """What the PNG of the run's image ``index`` says of itself: enough to make it again."""
    texts = {
        "prompt": record.prompt,
        "seed": "" if record.seed is None else str(record.seed),
        "model": plan.model,
        "steps": str(request.num_inference_steps),
        "guidance_scale": f"{request.guidance_scale:g}",
        "size": f"{request.width}x{request.height}",
        "batch_size": str(plan.stage("denoise").batch_size),
        "images": str(request.num_images),
        "dtype": plan.stage("denoise").compute_dtype,
        "weight_format": plan.weight_format_of("denoise", index),
        "text_weight_format": plan.weight_format_of("encode", index),
        "vae_tile": str(plan.stage("decode").tile_px or "off"),
        "max_sequence_length": str(request.max_sequence_length),
        "plan": plan.digest,
        "versions": " ".join(f"{name}=={version}" for name, version in versions.items()),
    }
    if record.upsampled_prompt is not None:
        texts["upsampled_prompt"] = record.upsampled_prompt
        texts["caption_upsample"] = f"temperature {plan.workload.upsample_temperature:g}, seed {record.upsample_seed}"
        if FORMATS[written := plan.stage("upsample").weight_format].is_quantized:
            texts["caption_upsample"] += f", {written} weights"
    if request.text_encoder_out_layers is not None:
        texts["text_encoder_out_layers"] = ",".join(map(str, request.text_encoder_out_layers))
    if plan.workload.adapters:
        texts["lora"] = ", ".join(map(str, plan.workload.adapters))
    if request.references:
        texts["references"] = ", ".join(map(str, request.references))
        texts["reference_tile"] = str(plan.stage("reference").tile_px or "off")
    if request.negative_prompt:
        texts["negative_prompt"] = request.negative_prompt
    return texts
