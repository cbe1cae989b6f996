"""What a run's tensors become: PIL images, arrays or latents, as diffusers' image processor makes them."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL.Image import Image

from lowmem_flux2.planning.models import ModelSpec
from lowmem_flux2.runtime.executor import Outcome

OutputType = Literal["pil", "np", "pt", "latent"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)


def images_of(
    outcome: Outcome, model: ModelSpec, output_type: OutputType
) -> list[Image] | np.ndarray[Any, Any] | torch.Tensor:
    """The result as a caller asked for it; the stock pipelines' latents differ: dev's are packed, klein's are not.

    No pictures where none were to be kept.
    """
    if output_type == "latent":
        found = outcome.packed_latents if model.form == "dev" else outcome.vae_latents
        assert found is not None
        return found
    if outcome.pictures is None:
        return []
    processor = Flux2ImageProcessor(vae_scale_factor=model.size_multiple)
    images: list[Image] | np.ndarray[Any, Any] | torch.Tensor = processor.postprocess(
        outcome.pictures, output_type=output_type
    )
    return images


def to_pil(picture: torch.Tensor) -> Image:
    """One decoded picture (1, 3, height, width) as diffusers' image processor converts it."""
    image: Image = Flux2ImageProcessor().postprocess(picture, output_type="pil")[0]
    return image
