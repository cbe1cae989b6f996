"""Reference images of a request: how large each is after preprocessing, and how many tokens that makes.

The arithmetic is that of the stock pipelines (diffusers' ``Flux2Pipeline.__call__``, step 4): a picture of more than
1024x1024 pixels is reduced to that area, its shape kept, and cropped in the middle to multiples of a latent patch. A
smaller one is only cropped, never enlarged.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_flux2.errors import UsageError
from lowmem_flux2.units import whole_number

if TYPE_CHECKING:  # Pillow is opened only where a picture is
    from PIL.Image import Image

MOST_REFERENCES = 10
"""Black Forest Labs announce FLUX.2 with up to ten."""
LEAST_SIDE_PX, MOST_ASPECT = 64, 8
"""Of a picture as it comes (Flux2ImageProcessor.check_image_input)."""
STOCK_BOUND_PX = 1024
LEAST_BOUND_PX, MOST_BOUND_PX = 64, 2048
_TURNED = range(5, 9)
"""EXIF orientations that exchange width and height."""
_ORIENTATION_TAG = 0x0112
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference image after preprocessing.

    Args:
        name: its file, or what to call it.
        width, height: pixels, multiples of a latent patch.
        bound_px: side of the square whose area it was reduced to, if it was larger.
        digest: first 12 hex digits of the SHA-256 of its file, or, in Python, of its pixels as they are encoded; ""
            where only the size is known.
    """

    name: str
    width: int
    height: int
    bound_px: int = STOCK_BOUND_PX
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.width}x{self.height}{f' sha256:{self.digest}' if self.digest else ''}"


def fitted(width: int, height: int, bound_px: int = STOCK_BOUND_PX) -> tuple[int, int]:
    """The size that a picture is reduced to: at most ``bound_px`` squared pixels."""
    area = bound_px * bound_px
    if width * height <= area:
        return width, height
    scale = sqrt(area / (width * height))  # as Flux2ImageProcessor._resize_to_target_area rounds
    return int(width * scale), int(height * scale)


def reduced(width: int, height: int, multiple: int, bound_px: int = STOCK_BOUND_PX) -> tuple[int, int]:
    """``fitted``, and cropped to multiples of so many pixels."""
    inside = fitted(width, height, bound_px)
    return inside[0] // multiple * multiple, inside[1] // multiple * multiple


def reference_of(name: str, width: int, height: int, multiple: int, bound_px: int = STOCK_BOUND_PX) -> Reference:
    """A picture of this size as it will be encoded.

    Args:
        name: what to call it in messages.
        multiple: pixels of a latent patch's side.
        bound_px: side of a square whose area bounds it.

    Raises:
        UsageError: too small, or too long and narrow.
    """
    if min(width, height) < LEAST_SIDE_PX:
        raise UsageError(f"{name}: {width}x{height} is too small for a reference: at least {LEAST_SIDE_PX} px a side")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise UsageError(f"{name}: {width}x{height} is too long for a reference: at most {MOST_ASPECT}:1; crop it")
    if not LEAST_BOUND_PX <= whole_number("the image size", bound_px) <= MOST_BOUND_PX:
        raise UsageError(f"the image size must be {LEAST_BOUND_PX} to {MOST_BOUND_PX} px, not {bound_px}")
    return Reference(name, *reduced(width, height, multiple, bound_px), bound_px)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def file_digest(path: Path) -> str:
    """``Reference.digest`` of a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return digest_of(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot read the reference image: {error.strerror or error}") from None


@contextmanager
def opened_picture(path: Path) -> Iterator[Image]:
    """An open picture file. Raises UsageError for whatever goes wrong in opening and reading it."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            yield picture
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such reference image") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path}: this is no picture that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot read the reference image: {error}") from None


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is to be seen, from its header alone.

    Raises:
        UsageError: no such file, or no picture.
    """
    with opened_picture(path) as picture:
        width, height = picture.size
        is_turned = picture.getexif().get(_ORIENTATION_TAG) in _TURNED
    return (height, width) if is_turned else (width, height)


def references_of(
    given: Sequence[str], multiple: int, bound_px: int = STOCK_BOUND_PX, *, may_be_sizes: bool = False
) -> tuple[Reference, ...]:
    """What ``--image`` was given, each as it will be encoded.

    Args:
        given: paths of pictures, or sizes like ``1024x768``.
        may_be_sizes: sizes are allowed, where a plan is all that is made.

    Raises:
        UsageError: a file that is no picture, a size where a picture is needed.
    """
    found = []
    for text in given:
        size = _SIZE.fullmatch(text)
        if size is None or Path(text).exists():
            reference = reference_of(text, *picture_size(Path(text)), multiple, bound_px)
            found.append(replace(reference, digest=file_digest(Path(text))))
        elif may_be_sizes:
            found.append(reference_of(text, int(size[1]), int(size[2]), multiple, bound_px))
        else:
            raise UsageError(f"--image {text}: there is no such file; a size stands for a picture in 'plan' only")
    return tuple(found)
