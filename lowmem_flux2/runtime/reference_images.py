"""Reference images as they are given, to what the VAE encodes: opened, upright, in RGB, reduced and cropped.

Resizing and cropping are the stock image processor's own. What it leaves to chance is decided here: transparent parts
become white, 16 bits are scaled to 8 and not cut off, files are turned as their EXIF orientation says, CMYK follows its
profile where it has one, and of an animation the first frame counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageCms, ImageOps

from lowmem_flux2.errors import UsageError
from lowmem_flux2.planning.references import (
    STOCK_BOUND_PX,
    Reference,
    digest_of,
    file_digest,
    opened_picture,
    reference_of,
)

SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
TRANSPARENT = ("RGBA", "LA", "PA", "La", "RGBa")


def open_picture(path: Path) -> Image.Image:
    """A picture file, whole, upright, in RGB.

    Raises:
        UsageError: no picture, damaged, or in colours that cannot be converted.
    """
    with opened_picture(path) as file:
        file.load()
        return as_rgb(ImageOps.exif_transpose(file), str(path))


def as_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A picture in RGB, 8 bits; one that is there already is left as it is.

    Args:
        name: what to call it in messages.

    Raises:
        UsageError: floating-point values, whose range nobody knows, or colours that Pillow cannot convert.
    """
    if picture.mode == "RGB":
        return picture
    if picture.mode == "F":
        raise UsageError(f"{name}: a picture of floating-point values; save it with 8 or 16 bits first")
    if picture.mode in SIXTEEN_BITS:
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UsageError(f"{name}: values from {values.min()} to {values.max()}; save it with 8 or 16 bits first")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "CMYK" and "icc_profile" in picture.info:
        with suppress(ImageCms.PyCMSError, OSError):  # a profile that cannot be used counts as none
            profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
            turned = ImageCms.profileToProfile(picture, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if turned is not None:
                return turned
    if picture.mode in TRANSPARENT or "transparency" in picture.info:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    try:
        return picture.convert("RGB")
    except ValueError:
        raise UsageError(f"{name}: a picture in {picture.mode}; save it in RGB first") from None


def pictures_of(image: object) -> list[tuple[str, Image.Image]]:
    """What ``image`` was given, picture by picture in RGB, each with what to call it.

    Args:
        image: a PIL image, a path, an array (h, w, channels) or a tensor (channels, h, w) with values in [0, 1] or in
            8 bits, a batch of either, or a list of these.

    Raises:
        UsageError: anything else.
    """
    given = list(image) if isinstance(image, list | tuple) else [image]
    flat = [one for each in given for one in _unbatched(each)]
    if not flat:
        raise UsageError("image: there is no reference image in it; leave it out")
    found = []
    for number, one in enumerate(flat, 1):
        name = f"reference image {number}"
        if isinstance(one, str | Path):
            found.append((str(one), open_picture(Path(one))))
        elif isinstance(one, Image.Image):
            try:
                one.load()  # one that was opened is not read before it is needed
            except (OSError, ValueError, AssertionError) as error:  # the last of one that is closed
                raise UsageError(f"{name}: cannot read it: {str(error) or 'its file is closed'}") from None
            found.append((name, as_rgb(one, name)))
        elif isinstance(one, np.ndarray):
            found.append((name, as_rgb(_from_array(one, name), name)))
        else:
            raise UsageError(f"{name} is a {type(one).__name__}: give PIL images, paths, arrays or tensors")
    return found


def _unbatched(given: object) -> Iterable[object]:
    """Arrays (h, w, channels) of what is an array or a tensor, else the same."""
    if isinstance(given, torch.Tensor):
        channels_last = given.detach().to("cpu").movedim(-3, -1) if given.ndim >= 3 else given
        if channels_last.dtype in (torch.bfloat16, torch.float16):
            channels_last = channels_last.float()
        given = channels_last.numpy()
    if isinstance(given, np.ndarray) and given.ndim == 4:
        return list(given)
    return [given]


def _from_array(array: npt.NDArray[np.generic], name: str) -> Image.Image:
    """(h, w), or (h, w, 1 to 4 channels) to a PIL image; floats are rounded to 8 bits as diffusers does."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise UsageError(
            f"{name} has the shape {array.shape}: (h, w, channels) of an array, (channels, h, w) of a tensor, with 1, "
            "3 or 4 channels; latents are not taken"
        )
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise UsageError(f"{name} has values from {array.min():g} to {array.max():g}: floats must be in [0, 1]")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise UsageError(f"{name} is of {array.dtype}: floats in [0, 1], or 8 bits")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)


def prepared(picture: Image.Image, reference: Reference) -> torch.Tensor:
    """The picture as the request has it, (height, width, 3) in 8 bits.

    Raises:
        UsageError: it is not of the size that the plan was made for.
    """
    processor, bound = Flux2ImageProcessor(), reference.bound_px
    if picture.width * picture.height > bound * bound:
        picture = processor._resize_to_target_area(picture, bound * bound)
    if picture.width < reference.width or picture.height < reference.height:
        raise UsageError(f"{reference.name} has changed since the plan was made")
    cropped = processor._resize_and_crop(picture, reference.width, reference.height)
    return torch.from_numpy(np.array(cropped))


def prepare_references(
    given: Sequence[tuple[str, Image.Image]] | None, multiple: int, bound_px: int | None
) -> tuple[tuple[Reference, ...], tuple[torch.Tensor, ...]]:
    """``pictures_of`` what ``Engine.generate`` was given as ``image``: what the request says of it, and the pictures.

    Raises:
        UsageError: see ``pictures_of`` and ``reference_of``.
    """
    if given is None:
        if bound_px is not None:
            raise UsageError("image_size bounds reference images: give image, or leave it out")
        return (), ()
    bound = STOCK_BOUND_PX if bound_px is None else bound_px
    references, pictures = [], []
    for name, picture in given:
        reference = reference_of(name, *picture.size, multiple, bound)
        pictures.append(prepared(picture, reference))
        digest = digest_of(pictures[-1].numpy().tobytes())
        references.append(replace(reference, digest=digest))
    return tuple(references), tuple(pictures)


def load_references(references: Sequence[Reference]) -> tuple[torch.Tensor, ...]:
    """The pictures of a request whose references are files.

    Raises:
        UsageError: a file that is gone, damaged, or another one by now.
    """
    for one in references:
        if file_digest(Path(one.name)) != one.digest:
            raise UsageError(f"{one.name} has changed since the plan was made")
    return tuple(prepared(open_picture(Path(one.name)), one) for one in references)
