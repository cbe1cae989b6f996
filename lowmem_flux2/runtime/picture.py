"""Pictures on disk: names that never overwrite, PNG metadata, whole files or none."""

from __future__ import annotations

import os
import string
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.plan import Plan
from lowmem_flux2.planning.workload import Request
from lowmem_flux2.report import ImageRecord

FIELDS = ("seed", "index", "model")


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
        folder = path.parent
        if "{" not in str(folder):
            if not folder.is_dir():
                raise UsageError(f"--output {pattern}: there is no folder {folder}; create it first")
            try:
                with tempfile.NamedTemporaryFile(dir=folder, prefix=".lowmem-flux2-"):
                    pass  # os.access would say yes to root, and to a file system that is read-only
            except OSError as error:
                raise UsageError(f"--output {pattern}: the folder {folder} cannot be written to: {error}") from None

    def path(self, *, seed: int, index: int, model: str) -> Path:
        return Path(self._pattern.format(seed=seed, index=index, model=model.replace("/", "--")))


def save_png(picture: Image, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a picture whole or not at all; never over an existing file: ``name.png``, ``name_2.png``, ``name_3.png``...

    Returns:
        The path that was taken.
    """
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{threading.get_ident()}.png.tmp")
    try:
        with temporary.open("wb") as file:
            picture.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        number = 1
        while True:
            target = path if number == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
            try:
                os.link(temporary, target)  # fails if it exists, also against another process at the same moment
                return target
            except FileExistsError:
                number += 1
            except OSError:  # a file system without hard links
                try:
                    target.touch(exist_ok=False)  # claims the name
                except FileExistsError:
                    number += 1
                    continue
                try:
                    temporary.replace(target)
                except BaseException:
                    target.unlink()
                    raise
                return target
    finally:
        temporary.unlink(missing_ok=True)


def describe(request: Request, plan: Plan, record: ImageRecord, versions: Mapping[str, str]) -> dict[str, str]:
    """What a PNG says of itself: enough to make it again."""
    texts = {
        "prompt": record.prompt,
        "seed": "" if record.seed is None else str(record.seed),
        "model": plan.model,
        "steps": str(request.num_inference_steps),
        "guidance_scale": f"{request.guidance_scale:g}",
        "size": f"{request.width}x{request.height}",
        "max_sequence_length": str(request.max_sequence_length),
        "plan": plan.digest,
        "versions": " ".join(f"{name}=={version}" for name, version in versions.items()),
    }
    if request.negative_prompt:
        texts["negative_prompt"] = request.negative_prompt
    return texts
